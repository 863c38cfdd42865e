"""The PSNet and the LeNet of MNIST in eager PyTorch: same layers, loss and optimizer."""

from collections.abc import Callable

import numpy as np

import psjax

WEIGHTS = {"psnet": 46740, "lenet": 44426}


def program(
    model: str, dataset: psjax.data.Dataset, batches: np.ndarray, steps: int, loss: str
) -> Callable[[], None]:
    """Some training steps, on PyTorch's own threads.

    Args:
      model: psnet or lenet.
      dataset: images `[N, 28, 28, 1]` in uint8 and labels of 10 classes.
      batches: which images, `[n, batch]`; taken again and again, without the last.
      steps: of a call.
      loss: psl or psl-squared.

    Raises:
      AssertionError: the network has another number of weights than psjax's.
    """
    import torch  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    net = {"psnet": _psnet, "lenet": _lenet}[model]()
    if (count := sum(p.numel() for p in net.parameters())) != WEIGHTS[model]:
        msg = f"{model}: {count} weights instead of {WEIGHTS[model]}."
        raise AssertionError(msg)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    images = torch.from_numpy(dataset.images.transpose(0, 3, 1, 2).copy())
    labels = torch.from_numpy(dataset.labels.astype(np.int64))
    rows = torch.from_numpy(batches[np.arange(steps) % (len(batches) - 1)].astype(np.int64))
    slope = 2 if loss == "psl-squared" else 1

    def call():
        for index in rows:
            x, y = images[index].float() * dataset.scale, labels[index][:, None]
            optimizer.zero_grad()
            scores = net(x)
            terms = torch.exp(slope * (scores - scores.gather(1, y)))
            value = (terms.sum(1) - 1).mean()  # without j = y, whose term is 1
            value.backward()
            optimizer.step()

    return call


def _psnet():
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]
    from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

    C = 10

    def xavier(*shape):
        bound = (6 / sum(shape[1:])) ** 0.5
        return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

    class PSNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.fan_out = nn.Conv2d(1, 40, 5), nn.Conv2d(40, 30, 5)
            sizes = ((48, 24), (24, 15), (15, 1))
            self.kernels = nn.ParameterList(xavier(C, *size) for size in sizes)
            self.biases = nn.ParameterList(torch.zeros(C, 1, size[1]) for size in sizes)

        def forward(self, x):
            x = torch.sigmoid(F.avg_pool2d(self.trunk(x), 2))
            x = torch.sigmoid(F.avg_pool2d(self.fan_out(x), 2))
            x = x.reshape(len(x), C, -1).transpose(0, 1)  # [group, batch, features]
            for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases)):
                x = torch.baddbmm(bias, torch.sigmoid(x) if i else x, kernel)
            return x[..., 0].T

    return PSNet()


def _lenet():
    from torch import nn  # pyright: ignore[reportMissingImports]

    pooled = lambda i, o: (nn.Conv2d(i, o, 5), nn.AvgPool2d(2), nn.Sigmoid())
    return nn.Sequential(
        *pooled(1, 6),
        *pooled(6, 16),
        nn.Flatten(),
        nn.Linear(256, 120),
        nn.Sigmoid(),
        nn.Linear(120, 84),
        nn.Sigmoid(),
        nn.Linear(84, 10),
    )
