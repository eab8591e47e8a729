"""`python -m lrcompile`, which torchrun starts."""

import sys

from lrcompile.cli import main

sys.exit(main())
