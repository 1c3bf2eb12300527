"""Area and energy of VS-Quant's accelerator, with the accuracies measured by this project.

    python -m experiments.hardware --config=configs/hardware_resnet20.py --workdir=runs/hardware \
        --config.bench.dataset.name=cifar10_local --config.bench.dataset.data_dir=DIR \
        --config.bench.model.pretrained=PATH/akamaster_resnet20.safetensors

ResNet-20 is at hand to measure what results/ does not have: its accuracy in block formats and how
many scale products are zero. Without `bench.model.pretrained` these are left out, and the rest
needs a second. Expected: areas within 0.6 % and energies within 7 % of what was published, left-out
points on average; 37 % of the area and 24 % of the energy saved at 4/4/4/6. About a minute on
two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import cifar10_resnet20_ptq


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "experiment": "hardware_resnet20",
            "seed": 0,
            # The designs: all combinations of these; a scale "-" is one a channel or layer.
            "designs": {
                "weights": (3, 4, 6, 8),
                "activations": (3, 4, 6, 8),
                "scales": ("-", "3", "4", "6", "8", "10"),
            },
            "formats": ("nvfp4", "mxfp4", "mxint8"),  # block formats beside them
            "networks": ConfigDict(
                {
                    "resnet20": {
                        **_measured("ResNet-20, CIFAR-10", "ptq_resnet20"),
                        "gptq": "results/ptq_resnet20_gptq_rounding.csv",
                    },
                    "mobilenet_v1": {
                        **_measured("MobileNet v1 0.75, ImageNet", "ptq_mobilenet_v1"),
                        # Batch norms re-estimated, as in its vectors' tables.
                        "per_channel": "results/ptq_mobilenet_v1_depthwise.csv",
                        "per_channel_column": "weights max, batch norms re-estimated",
                        "gptq": "results/ptq_mobilenet_v1_gptq_rounding.csv",
                    },
                    "minilm": {
                        **_measured("MiniLM, SQuAD, F1", "ptq_minilm_bert"),
                        "per_channel": "results/ptq_minilm_bert_dynamic.csv",
                        "per_channel_column": "octav",
                    },
                },
                sort_keys=False,
            ),
            "bench": cifar10_resnet20_ptq.get_config("4/4U/4/6"),
            "bench_network": "resnet20",  # which of the networks that is
            "gating_images": 50,  # that scale products are counted on
        }
    )


def _measured(label: str, name: str) -> dict[str, Any]:
    """The tables of `experiments.ptq_figures --out=results/NAME`."""
    return {
        "label": label,
        "vectors": f"results/{name}_scales.csv",
        "per_channel": f"results/{name}_vectors.csv",
        "per_channel_column": "best per channel",
        "gptq": placeholder(str),  # its table "rounding"
    }
