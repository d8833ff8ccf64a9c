"""
A small vision transformer of one's own, with HYLA in the place of torch's attention, on scikit-learn's handwritten digits:

    python recipes/vision/digits.py [--attention torch] [--steps 300]

It takes some seconds on a CPU, and nothing is downloaded.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_hyla import HylaAttention, HylaConfig


WIDTH, HEADS, LAYERS, PATCH = 64, 8, 2, 2


class Block(nn.Module):
    """A layer of a pre-norm transformer encoder."""

    def __init__(self, attention: str):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        if attention == "hyla":
            # The encoder has positions of its own, in two dimensions. A width of None for a head means WIDTH / HEADS.
            config = HylaConfig(
                hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=None, value_head_dim=None, position_type="none"
            )
            self.attention = HylaAttention(config)
        else:
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, batch_first=True)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        output, _ = self.attention(x) if isinstance(self.attention, HylaAttention) else self.attention(x, x, x)
        return output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Images (batch, 8, 8) to logits (batch, 10), by way of a token for every patch of 2 × 2."""

    def __init__(self, attention: str):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((8 // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images.unsqueeze(1)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(dim=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small vision transformer on handwritten digits.")
    parser.add_argument("--attention", choices=("hyla", "torch"), default="hyla")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.from_numpy(data.images / 16).float(), torch.from_numpy(data.target)
    order = torch.randperm(len(images))
    train, test = order[:1500], order[1500:]

    model = Encoder(arguments.attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, arguments.steps + 1):
        batch = train[torch.randint(len(train), (64,))]
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:>4}  loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        right = model(images[test]).argmax(-1) == labels[test]
    print(f"accuracy on {len(test)} other images: {right.float().mean():.3f}")


if __name__ == "__main__":
    main()
