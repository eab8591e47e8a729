"""A pass of your own, in twenty lines: keep the first and the last block dense.

    python own_pass.py

`after="select"` places it; `weight_pass=True` makes it run once, when the weights are decided. It marks weights, and the
passes after it do the rest. A pass that rewrites the graph looks the same: it edits `gm` and lists what it changed.
"""

import re

import torch
from torch import fx, nn

import lrcompile
from lrcompile.passes import PassContext, PassResult, graph_pass


@graph_pass(exact=True, after="select", weight_pass=True)
def keep_the_ends_dense(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Leave the weights of the first and the last block as they are: errors there cost the most."""
    result = PassResult()
    found = {key: int(m[1]) for key in ctx.weights if (m := re.search(r"layers\.(\d+)\.", key))}
    ends = {min(found.values()), max(found.values())}
    for key, layer in found.items():
        weight = ctx.weights[key]
        if layer in ends and weight.selected:
            weight.selected, weight.reason = False, "in the first or the last block"
            result.changed.append(f"{key}: kept dense")
    return result


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A small transformer and its inputs, (2, 16, 128); also a SOURCE of the command line: own_pass:build."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), (torch.randn(2, 16, 128),)


def main() -> lrcompile.Report:
    model, inputs = build()
    recipe = lrcompile.Recipe(rank_ratio=0.25, passes=[keep_the_ends_dense])
    report = lrcompile.inspect(model, inputs, recipe, verify=True)
    print(report)
    lrcompile.adopt(model, report.plan)
    print(f"\nadopted: {sum(p.numel() for p in model.parameters()):,} parameters; output {tuple(model(*inputs).shape)}")
    return report


if __name__ == "__main__":
    main()
