# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""What travels with a checkpoint: torch, timm, transformers, and siblings in this folder; nothing else."""
