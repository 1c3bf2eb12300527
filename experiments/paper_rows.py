"""Every row of OCTAV's ImageNet tables: what was published, and the command that runs it here.

Usage:
    python -m experiments.paper_rows > results/README.md

Prints a Markdown page: tables 1 to 4 of arXiv:2206.06501 with a command for each row and what it is
expected to cost, and where the counterparts that have been run are.
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

# As published, top-1 in per cent.
_TABLE_1 = {
    "clipping=max,gradient=ste": 72.67,
    "clipping=octav,gradient=ste": 67.75,
    "clipping=octav,gradient=pwl": 74.31,
    "clipping=octav,gradient=mad": 74.81,
    "clipping=octav,gradient=mph": 75.15,
}
_TABLE_2_COLUMNS = tuple(
    f"bits={bits},clipping={clipping}" for bits in (4, 6, 8) for clipping in ("octav", "max")
)
_TABLE_2 = {
    "resnet50": (76.07, 75.15, 72.67, 76.07, 76.01, 76.24, 76.12),
    "resnet18": (70.12, 69.17, 65.65, 69.78, 69.52, 70.07, 70.19),
    "resnet101": (77.28, 76.48, 72.53, 77.30, 77.04, 77.31, 77.15),
    "mobilenet_v2": (71.71, 70.88, 69.17, 71.64, 71.79, 71.71, 71.77),
    "mobilenet_v3_small": (65.99, 54.68, 0.39, 65.02, 60.17, 65.98, 65.14),
    "mobilenet_v3_large": (72.97, 65.86, 1.25, 72.12, 69.38, 72.89, 72.78),
}
_TABLE_3_COLUMNS = (
    "clipping=octav",
    "clipping=max",
    "clipping=octav,scaling=static",
    "clipping=mse,scaling=static",
    "clipping=p99.9,scaling=static",
    "clipping=p99.99,scaling=static",
    "clipping=p99.999,scaling=static",
)
_TABLE_3 = {
    "resnet50": (75.38, 71.44, 75.84, 75.85, 75.66, 75.51, 75.29),
    "resnet18": (69.16, 65.53, 69.18, 69.28, 69.04, 69.08, 68.93),
    "resnet101": (76.10, 70.88, 76.96, 77.01, 76.79, 76.99, 76.34),
    "mobilenet_v2": (69.32, 66.94, 0.66, 0.93, 1.72, 2.14, 2.76),
    "mobilenet_v3_small": (53.52, 0.10, 0.43, 0.58, 0.65, 0.10, 1.46),
    "mobilenet_v3_large": (64.97, 39.46, 0.39, 0.30, 0.34, 0.71, 0.57),
}
_TABLE_4_COLUMNS = ("clipping=octav", "clipping=octav,scaling=static")
_TABLE_4 = {
    "resnet50": (76.21, 76.46),
    "resnet18": (69.90, 70.13),
    "resnet101": (76.84, 77.48),
    "mobilenet_v2": (71.23, 1.21),
    "mobilenet_v3_small": (58.93, 0.80),
    "mobilenet_v3_large": (69.21, 0.60),
}

# Multiplications of a forward pass of one image of 224 pixels, in billions.
_BILLIONS = {
    "resnet18": 1.8,
    "resnet50": 4.1,
    "resnet101": 7.8,
    "mobilenet_v2": 0.3,
    "mobilenet_v3_small": 0.06,
    "mobilenet_v3_large": 0.22,
}
_EPOCHS = {
    "scratch": {name: 150 if "resnet" in name else 300 for name in _BILLIONS} | {"resnet101": 80},
    "short": {name: 15 if name in ("resnet50", "resnet101") else 30 for name in _BILLIONS},
    "long": {name: 150 if "resnet" in name else 300 for name in _BILLIONS},
}
_IMAGES = 1_281_167
_OPERATIONS_A_SECOND = 1e14
_IMAGES_A_SECOND = 5_000

_HEAD = """\
# Results

What the papers published, the command that runs each row, and what has been run.
`python -m experiments.paper_rows > results/README.md` makes this page.

## What has been run

Each file names its command, commit, device and seed. No ImageNet training set was at hand, and no
accelerator for longer than minutes; the counterparts are smaller networks on fewer images.

- OCTAV, tables 1 and 2. CIFAR-10, ResNet-20 retrained from its float weights for one epoch, at 3
  and 4 bits: [`qat_cifar10_resnet20.md`](qat_cifar10_resnet20.md); with
  images held out, for two to five epochs at 2 to 4 bits, and for one epoch at 2 bits by each
  gradient, by the maximum and with static, carried and sharded thresholds, the 2-bit ones at a
  learning rate of 0.05:
  [`qat_cifar10_resnet20_held_out.md`](qat_cifar10_resnet20_held_out.md), and with thresholds
  learned by LSQ's gradient, [`qat_cifar10_resnet20_learned.md`](qat_cifar10_resnet20_learned.md).
  Taught by the float network instead of the labels it has as much after the epoch:
  [`qat_cifar10_resnet20_distilled.md`](qat_cifar10_resnet20_distilled.md).
  From scratch, the first
  epoch only, in float and at 4, 3 and 2 bits: 47.9, 49.5, 46.4 and 44.9, and 28.6 at 2 bits by the
  maximum, [`qat_cifar10_resnet20_scratch.md`](qat_cifar10_resnet20_scratch.md). Handwritten digits,
  ResNet-8 from scratch, three seeds: [`quickstart.json`](quickstart.json).
- OCTAV, table 3, where static thresholds cost MobileNets dearly. MobileNet v1 0.75 retrained on
  1,000 ImageNet images at 4-bit weights and 8-bit activations, 60 steps:
  [`qat_mobilenet_v1.md`](qat_mobilenet_v1.md). As trained both end below 9 %, and at 37 with their
  quantisers off: 60 steps are too few for the running statistics of its batch norms. With those
  estimated anew dynamic thresholds have 73.4 % of 1,000 validation images and static ones 72.7
  (standard error 1.4; 71.7 without retraining, weights clipped at the maximum): no collapse at
  8-bit activations. It says nothing about 4-bit ones.
- OCTAV's ImageNet networks: one training step of each at 4 bits, 16 images of noise of full size:
  [`imagenet_steps.json`](imagenet_steps.json). It says that the recipes run, and nothing else.
  Ten minutes of ResNet-18, 347 steps of 8 images: resident memory stays flat, 2,181 MiB after half
  a minute and 2,196 at the end, [`resident_memory_resnet18.json`](resident_memory_resnet18.json).
- VS-Quant, tables 2 to 5. CIFAR-10, pretrained ResNet-20 and ResNet-56: `ptq_resnet20_*.csv` and
  `ptq_resnet56_*.csv`. ImageNet, 1,000 validation images, pretrained MobileNet v1 0.75:
  `ptq_mobilenet_v1_*.csv`; the commands are in the `.json` files. MobileNet's calibrators see
  folded batch norms, as in the paper; its vectors, their sizes and their scales were measured with
  batch norms re-estimated and depthwise layers at 8 bits, so that "best per channel" beside them
  compares more than vectors. `ptq_mobilenet_v1_depthwise.csv` tells these apart.
- VS-Quant, table 9. CIFAR-10, ResNet-20 trained through 3/3U/4/6 vectors:
  [`qat_cifar10_resnet20_vectors.md`](qat_cifar10_resnet20_vectors.md).
- VS-Quant, figures 3 to 7: area and energy fitted to the published points, with accuracies measured
  here, `hardware_resnet20_*` ([`docs/hardware.md`](../docs/hardware.md)).
- OCTAV, table 5. SQuAD v1.1, MiniLM by windows of 384 tokens, 2,485 held-out questions,
  [`squad_minilm_384.md`](squad_minilm_384.md): F1 67.7 in float after an epoch of 10,258 questions,
  68.1 after two; with quantisers in the second, dynamic OCTAV has 67.4 at 8/8, 65.9 at 6/6 and 60.9
  at 4/4, 62.2 with smoothing, 62.8 with rotations; static OCTAV has 60.8 there, max scaling 13.3.
  BERT-base is published as losing 3.7 at 4/4, 0.8 at 6/6 and nothing at 8/8, 4.6 by static
  thresholds at 4/4 and 76.7 by max scaling.
- The same by windows of 256 tokens: two epochs in float at a learning rate of 3e-4 have F1 70.7,
  exact match 60.5, [`squad_minilm_256.md`](squad_minilm_256.md). Rotated, with a scale for each row
  of attention, they have 65.2 at 4/4 untrained, and no more by a third epoch, through quantisers:
  64.6, the loss of the held-out questions rising. Taught by the float network instead, three
  tenths of an epoch lead from 65.2 to 66.4, of 70.5,
  [`squad_minilm_256_distilled.md`](squad_minilm_256_distilled.md). Both epochs through these
  quantisers, as in the paper, end at 61.9,
  [`squad_minilm_256_from_encoder.md`](squad_minilm_256_from_encoder.md). At 1e-4, fine-tuned in
  float for 1.5 epochs: F1 68.2, exact match 57.3 on 2,485 held-out questions,
  [`squad_minilm.md`](squad_minilm.md); another epoch adds 0.3
  (`minilm-float-longer`). From the weights of F1 68.2 fine-tuned through quantisers
  for 149 steps, a fifth of an epoch: at 4/4 from 39.8 to 53.9, and to 57.6 after 299 steps more
  (`w4a4-octav-longer`, from where the first ended); at 6/6 no better than before, 62.1 on 497 of
  the questions (66.6 in float). So the drop at 4/4 is 10.6 after six tenths of an epoch and still
  shrinking, where BERT-base's is published as 3.7 after two.
- OCTAV, table 5, every calibrator at 8, 6 and 4 bits, a tenth of an epoch from the network below,
  497 of the questions (standard error 2, float 70.7):
  [`squad_minilm_256_table5.md`](squad_minilm_256_table5.md). Dynamic OCTAV ends at 70.5, 70.2 and
  56.2, static at 70.1, 68.5 and 58.4, the sweep at 69.2, 69.9 and 57.4, the best percentile of each
  width at 70.4, 69.0 and 49.2, the dynamic maximum at 68.5, 56.4 and 6.7. So OCTAV is 0.2 and 0.5
  below float at 8 and 6 bits, where BERT-base is published as 0.1 above and 0.8 below; at 4 bits
  75 steps are too few.
- VS-Quant, table 9. The same network and steps through vectors of 16 under 4- and 6-bit scales:
  4/4U/4/6 by the maximum from 67.8 to 63.3, 3/8U/4/6 from 66.0 to 64.5,
  [`squad_minilm_256_vectors.md`](squad_minilm_256_vectors.md): worse than untrained.
- OCTAV, table 5, and VS-Quant, tables 2, 3 and 6, without training and of one network: another
  training by the recipe of the 70.7, F1 70.6,
  [`squad_minilm_256_float.md`](squad_minilm_256_float.md), on 497 of the questions (standard error
  2), `ptq_minilm_256_*`: thresholds of every batch, six calibrators of static ones, vectors by the
  bits of their scales. At 8, 6 and 4 bits dynamic OCTAV has 70.3, 68.8 and 45.8, static 70.3, 67.5
  and 45.5, the sweep 71.0, 68.8 and 37.8; percentiles come to at most 70.2, 68.4 and 40.8. With
  activations at 8 bits (`…_bert_weight_calibrators.csv`) the best calibrator of one scale a channel
  has 68.7 at 4 bits of weights and 62.4 at 3, vectors of 16 by the maximum 69.2 and 66.3. The
  published columns are BERT-base, trained quantised for the dynamic ones. An earlier training (F1
  70.8 on the 497; no file of it is here), which the hardware model's figures are of:
  `ptq_minilm_bert_*`.
- Embeddings of that network at few bits too:
  [`ptq_minilm_embeddings.md`](ptq_minilm_embeddings.md).
- The 70.7 without training, outliers of activations as they are, smoothed or rotated, and where the
  drop at 4/4 is: `ptq_minilm_outliers*`. It is in the inputs of layers, which rotations mend, and
  as much in attention's products, which they do not reach. What unsigned codes and a scale for each
  row of attention make of those: `ptq_minilm_rows*`, rotated and rounded by GPTQ F1 66.4 at 4/4,
  66.3 of all 2,485 questions.
- OCTAV, appendix G. The activation of that MiniLM with the heaviest outliers, its error against the
  threshold: `outliers_minilm.*`.
- OCTAV, section 3 and propositions 4.1 and 4.2; VS-Quant, section 3. Errors against the threshold,
  gradients through clipping and ranges inside channels, on the tensors of the pretrained ResNet-20:
  `arguments_resnet20*` ([`docs/arguments.md`](../docs/arguments.md)).
- VS-Quant, tables 3 and 6. The same MiniLM without retraining, vectors of 16 and the bits of their
  scales: `ptq_minilm_bert_vectors.csv`, `ptq_minilm_bert_scales.csv`.
- Scale products rounded to 3 to 8 bits, whose accuracy VS-Quant does not report, and networks in
  integers beside their simulation: `integers.json`.
- Bits of each kernel chosen by sensitivity, beside the same bits everywhere: ResNet-20 at 3.02 bits
  on average, `inspect_resnet20*`; MobileNet v1 at 4.00, `inspect_mobilenet_v1*`.
- ONNX Runtime beside JAX, ResNet-20: `onnx_resnet20.json`. Every 8-bit and every frozen 4-bit
  answer is the same; on a CPU without VNNI the 8-bit graph is 0.27 of the float graph's size and
  takes 1.8 times its time.

## OCTAV's ImageNet rows

None has been run: each needs ImageNet and the accelerator-hours in its last column. Those are
arithmetic, not measurement: three times the forward pass's operations at a sustained 100 teraflop
a second, or 5,000 images a second if that takes longer. ARG is the argument of the config; every
command is

```
python -m experiments.train --config=configs/imagenet.py:ARG --workdir=DIR \\
    --config.dataset.data_dir=DIR [--config.model.pretrained=FILE.safetensors]
```

| table | published top-1, % | ARG | accelerator-hours |
| --- | --- | --- | --- |"""


class Row(NamedTuple):
    """One published figure.

    Attributes:
        table: of arXiv:2206.06501.
        published: top-1 in per cent.
        model: a network of `configs/imagenet.py`.
        recipe: scratch, short or long.
        settings: the rest of the config's argument.
    """

    table: int
    published: float
    model: str
    recipe: str
    settings: str

    @property
    def argument(self) -> str:
        """What stands behind the config's name."""
        return f"model={self.model},recipe={self.recipe},{self.settings}"

    @property
    def hours(self) -> float:
        """The time on one accelerator, by arithmetic."""
        images = _IMAGES * _EPOCHS[self.recipe][self.model]
        operations = 3 * 2e9 * _BILLIONS[self.model] * images
        return max(operations / _OPERATIONS_A_SECOND, images / _IMAGES_A_SECOND) / 3600


def rows() -> Iterator[Row]:
    """Every row of tables 1 to 4."""
    yield Row(1, _TABLE_2["resnet50"][0], "resnet50", "scratch", "bits=32")
    for settings, value in _TABLE_1.items():
        yield Row(1, value, "resnet50", "scratch", f"bits=4,{settings}")
    for model, (in_float, *values) in _TABLE_2.items():
        yield Row(2, in_float, model, "scratch", "bits=32")
        for settings, value in zip(_TABLE_2_COLUMNS, values, strict=True):
            yield Row(2, value, model, "scratch", settings)
    for model, short in _TABLE_3.items():
        for settings, value in zip(_TABLE_3_COLUMNS, short, strict=True):
            yield Row(3, value, model, "short", f"bits=4,{settings}")
    for model, long in _TABLE_4.items():
        for settings, value in zip(_TABLE_4_COLUMNS, long, strict=True):
            yield Row(4, value, model, "long", f"bits=4,{settings}")


def page() -> str:
    """The Markdown page."""
    lines = [
        f"| {row.table} | {row.published:.2f} | `{row.argument}` | {row.hours:.0f} |"
        for row in rows()
    ]
    return "\n".join([_HEAD, *lines])


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(page())
