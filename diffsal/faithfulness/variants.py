"""Variants of images: run in batches, and scored by the classes that the images settle."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffsal.maps.contrast import NO_CLASS, Choice, contrast
from diffsal.maps.modes import evaluated
from diffsal.maps.outputs import logits_of_run


@torch.no_grad()
def margin_drops(
    model: nn.Module,
    inputs: Tensor,
    variants: int,
    build: Callable[[Tensor, Tensor], Tensor],
    true: Choice = None,
    false: Choice = None,
    *,
    batch_size: int = 64,
) -> Tensor:
    """(B, variants) logits: each image's margin minus that of variants of it.

    Args:
        model: any classifier that :func:`diffsal.maps.contrast.contrast` can read; run in
            evaluation mode and left as it was.
        inputs: (B, C, H, W), on the model's device, of its dtype.
        variants: how many of each image.
        build: from (N,) indices of images and (N,) of variants to (N, C, H, W).
        true: see :func:`settled_margin`, as is ``false``.
        batch_size: variants per forward pass.

    Raises:
        DiffsalError: what :func:`diffsal.maps.contrast.contrast` refuses.

    Example:
        >>> images = torch.tensor([[[[5.0, 1.0]]], [[[2.0, 4.0]]]])
        >>> margin_drops(nn.Flatten(), images, 2, lambda image, variant: images[image] / 2, 0)
        tensor([[ 2.,  2.],
                [-1., -1.]])
    """
    everyone = torch.arange(len(inputs), device=inputs.device)
    with evaluated(model) as run:
        logits = batched_logits(run, inputs, batch_size)
        margin = settled_margin(logits, true, false)
        after = score_variants(run, inputs, variants, build, margin, batch_size=batch_size)
    return margin(logits, everyone)[:, None] - after


def score_variants(
    model: nn.Module,
    inputs: Tensor,
    variants: int,
    build: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int,
) -> Tensor:
    """(B, variants): build(sample, variant) makes images, score(logits, sample) rates them.

    Args:
        model: run in the mode that it is in.
        inputs: (B, ...).
        build: from (N,) indices of images and (N,) of variants to the model's inputs.
        score: from logits (N, K) and (N,) indices of images to (N,).
        batch_size: variants per forward pass.

    Example:
        >>> images = torch.tensor([[1.0], [2.0]])
        >>> score_variants(
        ...     nn.Identity(), images, 3, lambda image, power: images[image] ** power[:, None],
        ...     lambda logits, image: logits[:, 0], batch_size=4,
        ... )
        tensor([[1., 1., 1.],
                [1., 2., 4.]])
    """
    index = torch.arange(len(inputs) * variants, device=inputs.device)
    scores = []
    for part in torch.split(index, batch_size):
        sample, variant = part // variants, part % variants
        scores.append(score(read_logits(model, build(sample, variant)), sample))
    return torch.cat(scores).view(len(inputs), variants)


def settled_margin(
    logits: Tensor, true: Choice = None, false: Choice = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """How variants of images are scored: by the classes that the images themselves settle.

    Args:
        logits: (B, K), of the untouched images.
        true: see :func:`diffsal.maps.contrast.contrast`, as is ``false``; what is a callable or
            ``rest`` is asked anew for every variant.

    Returns:
        A function from logits (N, K) of variants, and the (N,) indices of the images that they
        are of, to their (N,) margins; differentiable.

    Raises:
        DiffsalError: what :func:`diffsal.maps.contrast.contrast` refuses.

    Example:
        >>> margin = settled_margin(torch.tensor([[0.0, 2.0], [3.0, 1.0]]))  # classes 1 and 0
        >>> margin(torch.tensor([[5.0, 1.0], [5.0, 1.0]]), torch.tensor([0, 1]))
        tensor([-4.,  4.])
    """
    whole = contrast(logits, true, false)

    def margin(logits: Tensor, sample: Tensor) -> Tensor:
        scores = contrast(
            logits,
            settled_choice(true, whole.true_class, sample),
            settled_choice(false, whole.false_class, sample),
        )
        return scores.true_score - scores.false_score

    return margin


def settled_choice(choice: Choice, classes: Tensor, sample: Tensor) -> Choice:
    """What variants of images are asked for: the classes that the images have settled, if they are.

    Args:
        choice: what the images were asked for.
        classes: (B,) int64, what came of it: ``true_class`` or ``false_class`` of their contrast.
        sample: (N,) indices of the images that the variants are of.

    Example:
        >>> settled_choice(None, torch.tensor([1, 0]), torch.tensor([0, 0, 1]))
        tensor([1, 1, 0])
    """
    if not (classes == NO_CLASS).any():
        return classes[sample]
    if isinstance(choice, Sequence) and not isinstance(choice, str):
        return [choice[index] for index in sample.tolist()]
    return choice


def read_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """(B, K), at least float32: what a run of the model, in its present mode, means as logits.

    Example:
        >>> read_logits(nn.Flatten(0), torch.tensor([[0.5], [2.0]]).half())
        tensor([[0.5000],
                [2.0000]])
    """
    logits = logits_of_run(model, inputs).logits
    if not isinstance(logits, Tensor):
        return logits  # contrast says what is wrong with it
    logits = logits[:, None] if logits.ndim == 1 else logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def batched_logits(model: nn.Module, inputs: Tensor, batch_size: int) -> Tensor:
    """(B, K): :func:`read_logits` of so many inputs at a time.

    Example:
        >>> batched_logits(nn.Flatten(), torch.ones(3, 1, 1, 2), batch_size=2).shape
        torch.Size([3, 2])
    """
    return torch.cat([read_logits(model, part) for part in torch.split(inputs, batch_size)])
