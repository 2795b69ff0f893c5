"""Train the digits network: ``python recipes/digits/train.py``.

Every seed is fixed and one thread computes, so a run on the same machine gives the same bytes.  The held-out
images take no part: neither in training nor in choosing the number of epochs or any other setting.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from data import Split, load
from model import build
from safetensors.torch import save_file
from torch import Tensor, nn

CHECKPOINT = Path(__file__).with_name("digits.safetensors")
EPOCHS = 20
BATCH = 64
PEAK_LEARNING_RATE = 5e-3
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="where the checkpoint goes")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    split = load()
    model = build()
    train(model, split)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, arguments.output)
    right = accuracy(model, torch.from_numpy(split.held_out_images), torch.from_numpy(split.held_out_labels))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"parameters          {parameters}")
    print(f"held-out accuracy   {right:.4f} on {len(split.held_out_labels)} images")
    print(f"time                {time.perf_counter() - started:.1f} s")


def train(model: nn.Module, split: Split) -> None:
    """AdamW with a one-cycle learning rate and label smoothing, on randomly shifted images; in place."""
    images, labels = torch.from_numpy(split.train_images), torch.from_numpy(split.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=1e-2)
    steps = -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, EPOCHS * steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    model.train()
    for _ in range(EPOCHS):
        for index in torch.split(torch.randperm(len(images)), BATCH):
            loss = loss_of(model(shifted(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def shifted(images: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in both directions, filled with 0; [n, 1, 8, 8] to the same."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, offsets, strict=True)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is at the label."""
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).double().mean())


if __name__ == "__main__":
    main()
