"""Print a policy, check it, or compare two.

Usage:
    python -m experiments.policy POLICY [OTHER] [--first=PATTERN] [--last=PATTERN]

POLICY and OTHER are YAML files or names of presets: octav-w4a4, vsquant-4/4U/4/6, nvfp4, octav-w4
of weights alone, …. One is printed as a file of it would be; of two the differences are, and the
exit status is 1 if there are any. A file may name quantisers by a notation; what is printed has all
their choices.

By itself a preset is one rule for all layers. Its name given to `quantize_model` keeps the first
convolution and the classifier at 8 bits, and so does --config.quant; a file does if --first and
--last say how they are called.

Examples:
    A preset as a file to change:

        python -m experiments.policy vsquant-4/4U/4/6 > mine.yaml

    With the ends that quantize_model would leave at 8 bits in a CIFAR ResNet:

        python -m experiments.policy octav-w4a4 --first=conv1 --last=linear > mine.yaml

    What was changed:

        python -m experiments.policy vsquant-4/4U/4/6 mine.yaml

    And a network with it: python -m experiments.ptq … --config.quant.policy=mine.yaml
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import qat_jax as qj
from experiments import cli


def read(name: str, first: str | None, last: str | None) -> qj.Policy:
    """A policy from a file or by its name.

    Args:
        name: of either.
        first: as of `qat_jax.preset`; a file has it or not.
        last: likewise.

    Raises:
        cli.UsageError: there is neither, or the file is wrong.
    """
    with cli.setup_errors():
        if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
            return qj.load_policy(name)
        return qj.preset(name, first=first, last=last)


def difference(a: str, b: str, first: str | None, last: str | None) -> str:
    """A unified diff of two policies in full; empty if they are equal. Arguments as of `read`."""
    before, after = (qj.policy_to_yaml(read(name, first, last)).splitlines() for name in (a, b))
    # As many lines around as show the pattern of the rule.
    return "\n".join(difflib.unified_diff(before, after, a, b, lineterm="", n=12))


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 printed, or no difference; 1 a difference; 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("policy", metavar="POLICY")
    parser.add_argument("other", metavar="OTHER", nargs="?")
    for end, layer in (("first", "first convolution"), ("last", "classifier")):
        parser.add_argument(
            f"--{end}",
            metavar="PATTERN",
            help=f"the path of the {layer}, which presets keep at 8 bits",
        )
    arguments = parser.parse_args(argv)
    ends = arguments.first, arguments.last

    def work() -> int:
        if arguments.other is None:
            print(qj.policy_to_yaml(read(arguments.policy, *ends)), end="")
            return 0
        found = difference(arguments.policy, arguments.other, *ends)
        if found:
            print(found)
        return 1 if found else 0

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
