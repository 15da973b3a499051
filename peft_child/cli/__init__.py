"""The command `peft-child`."""
