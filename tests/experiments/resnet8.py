"""What makes a CIFAR-10 config one for the digits and a ResNet-8 of four channels."""

FLAGS = (
    "--config.dataset.name=digits",
    "--config.dataset.mean=(0.5,)",
    "--config.dataset.std=(0.5,)",
    "--config.model.in_channels=1",
    "--config.model.depth=8",
    "--config.model.width=4",
)
