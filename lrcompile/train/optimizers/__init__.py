"""Optimizers and schedules for models with pairs, plain or sharded by FSDP2."""

from lrcompile.train.optimizers.groups import Pair as Pair
from lrcompile.train.optimizers.groups import Roles as Roles
from lrcompile.train.optimizers.groups import roles as roles
from lrcompile.train.optimizers.make import OPTIMIZERS as OPTIMIZERS
from lrcompile.train.optimizers.make import optimizers as optimizers
from lrcompile.train.optimizers.muon import Muon as Muon
from lrcompile.train.optimizers.product_decay import decay_products as decay_products
from lrcompile.train.optimizers.schedule import SCHEDULES as SCHEDULES
from lrcompile.train.optimizers.schedule import schedule as schedule
from lrcompile.train.optimizers.spectron import Spectron as Spectron
