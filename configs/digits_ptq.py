"""The float network of the quickstart, quantised after training: seconds, and nothing to download.

    make quickstart
    python -m experiments.ptq --config=configs/digits_ptq.py:4/4U --workdir=runs/digits-ptq

`model.pretrained` is the first float32 run that the quickstart leaves; a run of
`configs/digits.py` in float will do as well, --config.model.pretrained=RUN/weights.safetensors.
First convolution and classifier are at 8 bits, clipped at the maximum.

Expected accuracy (360 images, of which one is 0.28 points, and a standard error of about a point;
float 97.5; results/ptq_digits.md), quarter to half a minute each on two CPU cores, most of it
compilation:

    notation   weights and activations clipped at the maximum   by OCTAV
    4/4U       96.1                                             96.9
    3/3U       95.8                                             95.8
    3/3U/4/6   97.5
    3/-/4/-    97.5
    2/-        51.4                                             59.4

--config.calibration.gptq_batches=8 rounds kernels by 960 training images: 2/- by the maximum has
93.3 then.

ARG: bits as W/A/ws/as, such as 4/4U/4/6: weights, activations (U: unsigned where they can be), the
vector scales of each ("-": one floating-point scale a channel or layer); 4/-/4/- of weights alone;
a block format, such as nvfp4; "float".
"""

from ml_collections import ConfigDict

from configs import digits
from configs._ptq import ptq_config


def get_config(arg: str = "4/4U") -> ConfigDict:
    training = digits.get_config()
    config = ConfigDict(
        {
            "experiment": "digits_ptq",
            "task": "image_classification",
            "seed": 0,
            "dataset": training.dataset,
            "model": training.model,
            "batch_size": 120,  # a third of the test images
            **ptq_config(arg),
        }
    )
    config.model.pretrained = "runs/quickstart/float32-seed0/weights.safetensors"
    return config
