"""Train LeNet-5 on scikit-learn's digits for some seconds, so that there is something real to slim.

python scripts/train_lenet.py lenet5_digits.safetensors
archscan lenet5 --weights lenet5_digits.safetensors --data digits --eval-data digits --target-flops 0.3
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from archscan.data import ImageSet, calibration_images, evaluation_images
from archscan.sources import open_subject


def train(model: nn.Module, images: ImageSet, epochs: int, learning_rate: float) -> None:
    """Minimise the cross-entropy with AdamW and a one-cycle schedule, each batch shifted by up to three pixels."""
    images_NCHW, labels_N = (torch.cat(parts) for parts in zip(*images.batches(), strict=True))
    steps = -(-len(images) // images.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs=epochs, steps_per_epoch=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(images.batch_size):
            shift = torch.randint(-3, 4, (2,)).tolist()
            shifted = torch.roll(images_NCHW[batch], shift, dims=(2, 3))
            loss = F.cross_entropy(model(shifted), labels_N[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Return the percentage of images that the model classifies as labelled."""
    correct = sum(int((model(batch).argmax(1) == labels).sum()) for batch, labels in images.batches())
    return 100 * correct / len(images)


def main() -> None:
    """Train, print the accuracy and save the weights."""
    parser = argparse.ArgumentParser(description="Train LeNet-5 on scikit-learn's digits for some seconds.")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    subject = open_subject("lenet5", weights="random", seed=options.seed)
    training = calibration_images("digits", subject.preprocessing, samples=1297, batch_size=64, seed=options.seed)
    unseen = evaluation_images("digits", subject.preprocessing, batch_size=100)
    torch.manual_seed(options.seed)
    train(subject.model, training, options.epochs, learning_rate=2e-3)
    print(f"accuracy on {len(unseen)} unseen digits: {accuracy(subject.model, unseen):.1f}%")
    save_file(subject.model.state_dict(), options.output)
    print(f"weights written to {options.output}")


if __name__ == "__main__":
    main()
