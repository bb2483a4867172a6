"""Machines to plan for: what their data sheets say, and how much of it to count on."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Device:
    """memory: bytes. bandwidth: bytes/s of its memory. flops: dense bfloat16 FLOP/s. source: of these numbers.

    The gigabytes of the name are counted as 10^9 bytes. The devices hold 7 % more, which is left to driver, libraries
    and fragmentation.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    source: str
    eight_bit: str = "FP8"


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 80e9, 3.35e12, 989e12, "data sheet, SXM"),
        Device("h800", 80e9, 3.35e12, 989e12, "as H100, from which only its links differ"),
        Device("h200", 141e9, 4.8e12, 989e12, "data sheet, SXM"),
        Device("mi300x", 192e9, 5.3e12, 1307e12, "data sheet"),
        Device("910c", 128e9, 3.2e12, 752e12, "reports, no data sheet; a device is a package of two dies", "INT8"),
    )
}

# Name for --assume -> (field, unit in the field's).
ASSUMPTIONS = {
    "memory-gb": ("memory", 1e9),
    "bandwidth-tbs": ("bandwidth", 1e12),
    "tflops": ("flops", 1e12),
    "products": ("products", 1.0),
    "attention": ("attention", 1.0),
    "reserve-gb": ("reserve", 1e9),
    "overhead-ms": ("overhead", 1e-3),
}


@dataclass(frozen=True)
class Node:
    """`count` devices, all connected alike.

    products, attention: of the peak, the part that matrix products and attention in expanded form reach, and attention
        in latent space. reserve: bytes per device for activations, graphs and buffers.
    overhead: seconds of every step for all that a roofline does not know: communication and launches.
    """

    device: Device
    count: int
    products: float = 0.4
    attention: float = 0.6
    reserve: float = 3e9
    overhead: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.count}x{self.device.name}"

    @classmethod
    def parse(cls, text: str, assumptions: Sequence[str] = ()) -> "Node":
        """From "8xh200" and settings like "bandwidth-tbs=4.2". UserError for what is unknown or no number."""
        match = re.fullmatch(r"(\d{1,6})x([a-z0-9]+)", text.lower())
        if match is None or not int(match[1]):
            raise UserError(f"node {text!r} is not COUNTxDEVICE, such as 8xh200; devices are {', '.join(DEVICES)}")
        device = DEVICES.get(match[2])
        if device is None:
            close = difflib.get_close_matches(match[2], DEVICES, 1)
            hint = f"did you mean {match[1]}x{close[0]}?" if close else f"devices are {', '.join(DEVICES)}"
            raise UserError(f"unknown device {match[2]!r} of node {text!r}; {hint}")
        node = cls(device, int(match[1]))
        for assumption in assumptions:
            node = node._assume(assumption)
        return node

    def _assume(self, text: str) -> "Node":
        name, _, value = text.partition("=")
        if name not in ASSUMPTIONS:
            raise UserError(f"unknown assumption {text!r}; it is NAME=NUMBER, and names are {', '.join(ASSUMPTIONS)}")
        field, unit = ASSUMPTIONS[name]
        zero = field in ("reserve", "overhead")
        most = 1.0 if field in ("products", "attention") else float("inf")
        try:
            number = float(value) * unit
        except ValueError:
            number = float("nan")
        if not (0 <= number <= most and number < float("inf") and (number > 0 or zero)):
            bounds = "from 0 to 1, without 0" if most == 1 else "0 or more" if zero else "above 0"
            raise UserError(f"assumption {text!r}: {name} must be a number {bounds}")
        change: dict[str, Any] = {field: number}
        if field in ("memory", "bandwidth", "flops"):
            source = f"{self.device.source}; {name} as given"
            change = {"device": dataclasses.replace(self.device, source=source, **change)}
        return dataclasses.replace(self, **change)
