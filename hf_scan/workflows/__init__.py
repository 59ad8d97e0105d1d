# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Whole runs, from arguments to a finished folder."""
