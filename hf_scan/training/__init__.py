# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Training with self-distillation, checkpoints and output folders."""

from ..extras import require_extra


require_extra("train", "`hf_scan.training`")
