"""Symmetric products at half the work of general ones: BLAS's syrk makes one triangle. torch has none."""

import torch
from jaxtyping import Float64
from scipy.linalg.blas import dsyrk
from torch import Tensor


def add_gram(triangle: Float64[Tensor, "d d"], x: Float64[Tensor, "n d"]) -> None:
    """Add x^T x to the upper triangle, in place; what stands below it afterwards is no result. x: contiguous, or its
    transpose is."""
    if x.device.type == "cpu" and triangle.is_contiguous():
        # Fortran's order is that of the transpose, so its lower triangle is the upper one here. Neither of the calls copies.
        array, result = x.numpy(), triangle.numpy().T
        if x.is_contiguous():
            dsyrk(1.0, array.T, beta=1.0, c=result, lower=1, overwrite_c=1)
        else:
            dsyrk(1.0, array, beta=1.0, c=result, lower=1, overwrite_c=1, trans=1)
    else:
        triangle.addmm_(x.T, x)


def symmetric(triangle: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """The symmetric matrix with this upper triangle."""
    result = torch.triu(triangle)
    result += torch.triu(triangle, 1).T
    return result
