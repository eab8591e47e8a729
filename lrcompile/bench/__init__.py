"""The measurements users run on their own machine: `lrcompile bench NAME`.

adopt    seconds to adopt a GPT-2 124M-shaped model at 2.64x
plan     seconds and memory to plan Llama-2-7B from its config on the meta device
step     step and compile time of an adopted model against the same low-rank model written by hand, under Inductor; on a
         GPU tokens/s, MFU and peak memory of GPT-2 1.5B and Llama 1B against dense torch.compile too
memory   bytes to finetune Llama-2-7B, by the plan; activations that one block keeps, against peft's QLoRA
driver   what the training driver costs over a bare loop of the same model, and how long it waits for data
materialise  seconds and memory to start GPT-2 1.5B from its config on two ranks
finetune  peak memory and speed of finetuning Llama 3 8B in NF4, against peft and bitsandbytes, on a GPU
kernels  our kernels against the vendor's library and torch.compile, on a GPU; without one, what the cost model expects
quality  held-out loss of dense and low-rank twins, trained on the same tokens: at equal tokens, FLOPs and seconds
export   bytes of files for a phone (GPT-2 1.5B at r = d/4), rates of ExecuTorch's runtime against the dense models
aot      what every shipped kernel configuration compiles to, for every GPU target; needs no GPU

Times vary from run to run and machine to machine: what is compared is measured side by side, and given as a ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lrcompile.errors import LrcompileError

NAMES = ("adopt", "plan", "step", "memory", "driver", "materialise", "finetune", "kernels", "quality", "export", "aot")


def main(argv: Sequence[str]) -> None:
    """Run one measurement by name and print its table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lrcompile bench", description=__doc__, formatter_class=raw)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name in NAMES:
        own = names.add_parser(name)
        own.add_argument("--quick", action="store_true", help="a small part: checks that the measurement runs")
        if name in ("driver", "materialise", "step", "finetune", "kernels"):
            own.add_argument("--out", type=Path, metavar="DIR", help=f"write {name}-DEVICE.json there")
        if name == "export":
            own.add_argument(
                "--out", type=Path, metavar="DIR", help="keep the files; what is there isn't written again"
            )
        if name == "step":
            own.add_argument(
                "--minutes", type=float, default=1.5, help="of steps for each model on a GPU (default 1.5)"
            )
        if name == "quality":
            own.add_argument(
                "config", type=Path, metavar="CONFIG", help="which twins, as examples/configs/quality/*.toml"
            )
            own.add_argument("--out", type=Path, metavar="DIR", required=True, help="the runs, and what they came to")
            own.add_argument("--data", metavar="DIR", help="directory of `lrcompile data`, instead of CONFIG's")
        if name == "kernels":
            own.add_argument("--show", type=Path, metavar="FILE", help="print the table of a result file")
            own.add_argument("--minutes", type=float, default=7.0, help="stop measuring after so long (default 7)")
            own.add_argument(
                "--target", default="H100", help="the GPU whose expected figures are shown where there is none"
            )
    arguments = vars(parser.parse_args(argv))
    name = arguments.pop("name")
    try:
        import_module(f"lrcompile.bench.{name}").run(**arguments)
    except ImportError as error:
        raise LrcompileError(
            f'{error}; install what it needs with pip install "lrcompile[hf,train,quant,examples]"'
        ) from error
