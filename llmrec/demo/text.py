"""How the page writes texts and numbers that it was given."""

import math
import re

# Characters that no HTML file may hold, and halves of surrogate pairs, which UTF-8 cannot spell.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def readable(text: str) -> str:
    """A plain str whose every character can be sent and shown; markup in it is still text.

    >>> readable("lip\\x00balm")
    'lip\ufffdbalm'
    """
    # The substitution makes a plain str of a Markup, too, which would pass a template unescaped.
    return _UNWRITABLE.sub("\ufffd", text)


def shortened(text: str, most: int) -> str:
    """The text in one line of at most `most` characters.

    >>> shortened("a  rose\\nis a rose", 8)
    'a rose …'
    """
    line = " ".join(readable(text[: 4 * most + 100]).split())
    return line if len(line) <= most else line[: most - 1].rstrip(" ") + (" …" if line[most - 2] == " " else "…")


def log_probability(value: float) -> str:
    """A log-probability, with a real minus.

    >>> log_probability(-1.5), log_probability(0.0)
    ('−1.500', '0.000')
    """
    return f"{value:.3f}".replace("-0.000", "0.000").replace("-", "−")


def probability(log: float) -> str:
    """A probability in percent, however small.

    >>> probability(math.log(0.5)), probability(math.log(0.00042)), probability(-30.0), probability(-1000.0)
    ('50.0 %', '0.042 %', '9.4e-12 %', '< 1e-300 %')
    """
    percent = 100 * math.exp(min(log, 0.0))
    if percent < 1e-300:
        return "< 1e-300 %"
    if percent >= 1:
        return f"{percent:.1f} %"
    return f"{percent:.2g} %"


def exponential(log: float) -> float:
    """The number of a logarithm that is 0 at most, but for rounding; what is no number becomes 0.

    >>> exponential(0.0), exponential(1e-9), exponential(float("nan"))
    (1.0, 1.0, 0.0)
    """
    return math.exp(min(log, 0.0)) if log == log else 0.0


def milliseconds(seconds: float) -> str:
    """A duration.

    >>> milliseconds(0.0123), milliseconds(4.2)
    ('12 ms', '4.2 s')
    """
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
