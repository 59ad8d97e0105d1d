# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Report what was measured as a table, a model card and pictures."""
