"""Other libraries: PEFT's registry, transformers' Trainer, and the Hugging Face Hub."""
