"""The building blocks of the FID network, named as in torchvision's inception_v3 so that weight files fit.

Szegedy et al. 2015 (arXiv 1512.00567), figures 5 to 7 and 10, with the two ways in which the TensorFlow graph
of 2015-12-05 differs from torchvision's: average pools leave the padding out of the mean, and the last block
takes a maximum and the others an average.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNormReLU(nn.Module):
    """Convolution without bias, BatchNorm (eps 1e-3), ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


def halve(x: Tensor) -> Tensor:
    """3x3 maxima at every other pixel; x has an odd number of rows and columns."""
    if x.device.type != "cpu":
        return F.max_pool2d(x, 3, stride=2)
    # The same numbers, down the rows and then along them: torch's own loop over contiguous channels is four times as slow.
    x = torch.maximum(torch.maximum(x[..., 0:-2:2, :], x[..., 1:-1:2, :]), x[..., 2::2, :])
    return torch.maximum(torch.maximum(x[..., 0:-2:2], x[..., 1:-1:2]), x[..., 2::2])


def _average(x: Tensor) -> Tensor:
    """3x3 averages at the same size, of the pixels that are there: padding does not count, unlike in torchvision's."""
    return F.avg_pool2d(_channels_last_on_cpu(x), 3, stride=1, padding=1, count_include_pad=False).contiguous()


def _maximum(x: Tensor) -> Tensor:
    """3x3 maxima at the same size."""
    return F.max_pool2d(_channels_last_on_cpu(x), 3, stride=1, padding=1).contiguous()


def _channels_last_on_cpu(x: Tensor) -> Tensor:
    """In the layout that torch's pooling has vectors for: the same numbers twice as fast. (Convolutions in that layout are
    faster, too, but round otherwise.)"""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class BlockA(nn.Module):
    """35x35: inputs channels -> 224 + pool; 1x1, 5x5 and double 3x3 convolutions, average pool."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormReLU(inputs, 64, 1)
        self.branch5x5_1 = ConvNormReLU(inputs, 48, 1)
        self.branch5x5_2 = ConvNormReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNormReLU(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, padding=1)
        self.branch_pool = ConvNormReLU(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35x35 -> 17x17: inputs channels -> inputs + 480; strided 3x3 and double 3x3 convolutions, max pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNormReLU(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNormReLU(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNormReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNormReLU(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], 1)


class BlockC(nn.Module):
    """17x17: inputs channels -> 768; 1x1 and factorised 7x7 convolutions, average pool."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNormReLU(inputs, 192, 1)
        self.branch7x7_1 = ConvNormReLU(inputs, width, 1)
        self.branch7x7_2 = ConvNormReLU(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNormReLU(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvNormReLU(inputs, width, 1)
        self.branch7x7dbl_2 = ConvNormReLU(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNormReLU(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNormReLU(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNormReLU(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvNormReLU(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17x17 -> 8x8: inputs channels -> inputs + 512; strided convolutions, max pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNormReLU(inputs, 192, 1)
        self.branch3x3_2 = ConvNormReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNormReLU(inputs, 192, 1)
        self.branch7x7x3_2 = ConvNormReLU(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNormReLU(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNormReLU(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, halve(x)], 1)


class BlockE(nn.Module):
    """8x8: inputs channels -> 2048; 1x1 and split 3x3 convolutions; the pool is a maximum by `max_pool`."""

    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = ConvNormReLU(inputs, 320, 1)
        self.branch3x3_1 = ConvNormReLU(inputs, 384, 1)
        self.branch3x3_2a = ConvNormReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNormReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNormReLU(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNormReLU(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNormReLU(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNormReLU(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNormReLU(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = _maximum(x) if self.max_pool else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )
