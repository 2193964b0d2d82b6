"""The Adversarial Difficulty Measure of one batch, computed in the margin domain.

ADM is the normalised gap between the loss of a sample and of its adversarial version (Aizawa and Hayashi, BMVC 2025,
arXiv 2508.18726; formula and attack are our reading). With the losses l and l' all natural normalisations are
monotone in ln(l'/l). In float32 cross-entropy itself is 0 from a margin of about 17, where ADM is needed most; so
everything here follows from the margin

    m = logsumexp_{j != y}(z_j) - z_y        l = softplus(m) = ln(1 + e^m)

in float64 from the logits on, since differences of margins are small against the margins themselves.

Shapes: B samples, K classes, C, H, W of an image.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from scorer.attacks import Attack
from shared.errors import DataError
from shared.models import logits


def score_batch(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, attack: Attack) -> dict[str, Tensor]:
    """Score one batch: forward, backward to the input, forward (FGSM).

    Runs in eval mode and leaves the model (parameters, buffers, gradients, modes) and the global RNG as they were.

    Args:
        model: takes (B, ...) inputs, returns logits (B, K) or something that has them as `logits`.
        x_BCHW: inputs inside `attack.clamp`, on the model's device.
        y_B: integer labels in 0..K-1.
        attack: `scorer.attacks.Fgsm` or `Pgd`.

    Returns: 1-D CPU tensors of length B, named and typed as in `shared.schema.SCORE_SCHEMA`: margin,
        adversarial_margin, log_ratio, grad_norm, el2n (float32), predicted (int32), correct, robust (bool).

    Raises: DataError (a ValueError) for labels out of range, inputs outside the clamp range or not finite, or lengths
        that differ.
    """
    y_B, num_labels = _check_inputs(x_BCHW, y_B, attack)
    # The precision of a score is part of what it is: not the caller's autocast.
    with _undisturbed(model, x_BCHW.device), torch.inference_mode(False), _no_autocast(x_BCHW.device):
        x_BCHW = x_BCHW.clone() if x_BCHW.is_inference() else x_BCHW.detach()
        y_B = y_B.clone() if y_B.is_inference() else y_B

        def gradient(at_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The margin's gradient to the input, and on the way the logits and its gradient to them."""
            leaf_BCHW = at_BCHW.detach().requires_grad_()
            with torch.enable_grad():
                logits_BK = _forward(model, leaf_BCHW, num_labels)
            margin_grad_BK = _margin_gradient(logits_BK.detach(), y_B)
            (grad_BCHW,) = torch.autograd.grad(logits_BK, leaf_BCHW, margin_grad_BK)
            return grad_BCHW, logits_BK.detach(), margin_grad_BK

        grad_BCHW, logits_BK, margin_grad_BK = gradient(x_BCHW)
        with torch.no_grad():
            adversarial_BCHW = attack(x_BCHW, grad_BCHW, lambda at_BCHW: gradient(at_BCHW)[0])
            # An input that did not move has a ratio of exactly 1, whatever kernels the second forward uses.
            same_B = (adversarial_BCHW - x_BCHW).flatten(1).abs_().sum(1) == 0
            adversarial_BK = _forward(model, adversarial_BCHW, num_labels)
            adversarial_BK = torch.where(same_B[:, None], logits_BK, adversarial_BK)
            logits_2BK = torch.stack([logits_BK, adversarial_BK]).double()
            m_2B = margin(logits_2BK, y_B.expand(2, -1))
            log_loss_2B = log_softplus(m_2B)
            predicted_2B = logits_2BK.argmax(2)
            right_2B = predicted_2B == y_B
            # d softplus(m) / d m = sigmoid(m) = 1 - softmax(z)_y; and softmax(z) - onehot(y) is that times dm/dz.
            wrong_B = m_2B[0].sigmoid()
            columns = {
                "margin": m_2B[0].float(),
                "adversarial_margin": m_2B[1].float(),
                "log_ratio": (log_loss_2B[1] - log_loss_2B[0]).float(),
                "grad_norm": (wrong_B * torch.linalg.vector_norm(grad_BCHW.flatten(1), dim=1)).float(),
                "el2n": (wrong_B * torch.linalg.vector_norm(margin_grad_BK, dim=1)).float(),
                "predicted": predicted_2B[0].int(),
                "correct": right_2B[0],
                "robust": right_2B[1],
            }
            return {name: column.cpu() for name, column in columns.items()}


def margin(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """m = logsumexp_{j != y}(z_j) - z_y over the last dimension: negative when confident and right."""
    label_B1 = y_B[..., None]
    others_BK = logits_BK.scatter(-1, label_B1, float("-inf"))
    return others_BK.logsumexp(-1) - logits_BK.gather(-1, label_B1).squeeze(-1)


def _margin_gradient(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """dm/dz, shape (B, K): the softmax over j != y, and -1 at y."""
    label_B1 = y_B[:, None]
    wide_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
    gradient_BK = wide_BK.scatter(1, label_B1, float("-inf")).softmax(1)
    return gradient_BK.scatter_(1, label_B1, -1.0).to(logits_BK.dtype)


def log_softplus(m_B: Tensor) -> Tensor:
    """ln softplus(m), the log of the cross-entropy at margin m, of float64 margins of any size.

    Below m = -30 softplus(m) = e^m (1 - e^m/2 + ...), whose log is m to 5e-14.
    """
    return torch.where(m_B < -30.0, m_B, nn.functional.softplus(m_B).log())


def _forward(model: nn.Module, x_BCHW: Tensor, num_labels: int) -> Tensor:
    """The model's logits (B, K), checked to be of as many classes as the labels need."""
    logits_BK = logits(model(x_BCHW))
    if logits_BK.dim() != 2 or len(logits_BK) != len(x_BCHW) or logits_BK.shape[1] < 2:
        shape = tuple(logits_BK.shape)
        raise DataError(
            f"the model gives logits of shape {shape}, not ({len(x_BCHW)}, K) with K >= 2",
            fix="let it return one row of logits for each input",
            key="model",
        )
    if num_labels > logits_BK.shape[1]:
        raise DataError(
            f"label {num_labels - 1} is outside 0..{logits_BK.shape[1] - 1}, the model's classes",
            fix="give the model as many classes as the labels have",
            key="y_B",
        )
    return logits_BK


def _check_inputs(x_BCHW: Tensor, y_B: Tensor, attack: Attack) -> tuple[Tensor, int]:
    """The labels as int64 on the inputs' device, and one more than the highest."""
    if y_B.dim() != 1 or x_BCHW.dim() < 2 or len(x_BCHW) != len(y_B):
        raise DataError(
            f"inputs of shape {tuple(x_BCHW.shape)} and labels of shape {tuple(y_B.shape)} do not match",
            fix="give one label, a number, for each input",
            key="y_B",
        )
    if not x_BCHW.is_floating_point():
        raise DataError(
            f"inputs are {x_BCHW.dtype}, and the attack needs floats",
            fix="give such, of pixels in [0, 1]",
            key="x_BCHW",
        )
    if y_B.is_floating_point() or y_B.dtype == torch.bool:
        raise DataError(f"labels are {y_B.dtype}", fix="give integers", key="y_B")
    y_B = y_B.to(device=x_BCHW.device, dtype=torch.int64)
    if not len(y_B):
        return y_B, 0
    lowest, highest = (int(v) for v in torch.aminmax(y_B))
    if lowest < 0:
        raise DataError(f"label {lowest} is below 0", fix="number the classes from 0 up", key="y_B")
    largest = torch.finfo(x_BCHW.dtype).max
    low, high = attack.clamp or (-largest, largest)
    least, most = (float(v) for v in torch.aminmax(x_BCHW.detach()))
    if not (low <= least and most <= high):  # also when one is NaN
        fix = "bring them into it, or set scoring.attack.clamp to theirs, or to none"
        if math.isnan(least):
            fix = "repair the samples that hold NaN, or leave them out"
        raise DataError(
            f"inputs lie in [{least}, {most}], outside the clamp range [{low}, {high}]", fix=fix, key="x_BCHW"
        )
    return y_B, highest + 1


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    off = not torch.is_autocast_enabled(device.type)
    return contextlib.nullcontext() if off else torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode inside; afterwards module modes, buffers and the random number generators are as they were."""
    modules = list(model.modules())
    in_train_mode = [module for module in modules if module.training]
    buffers = [
        (module._buffers, name, buffer, buffer._version, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    rng = torch.get_rng_state()
    device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for module in in_train_mode:
        module.training = False
    try:
        yield
    finally:
        for module in in_train_mode:
            module.training = True
        with torch.no_grad():
            for slots, name, buffer, version, before in buffers:
                slots[name] = buffer
                # Compared on the CPU only, where that is cheap: there, writes that bypass autograd are seen too. An
                # unnecessary copy would spoil a backward pass of the caller's in flight.
                if buffer._version != version or (device.type == "cpu" and not torch.equal(buffer, before)):
                    buffer.copy_(before)
        torch.set_rng_state(rng)
        if device_rng is not None:
            torch.cuda.set_rng_state(device_rng, device)
