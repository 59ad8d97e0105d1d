# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""The network and its engines: all modules that a checkpoint with code carries.

A module here imports torch, timm, transformers, what these bring, and siblings in this folder; nothing else.
"""
