"""What results depend on besides the code."""

import platform
from pathlib import Path


def processor() -> str:
    """The name of the processor, as the operating system has it."""
    facts = Path("/proc/cpuinfo")
    names = [line for line in facts.read_text().splitlines() if "model name" in line] if facts.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
