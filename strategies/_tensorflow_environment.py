"""What TensorFlow and what it imports read from the environment: set when this module is imported, so import it first.

Variables that are set already stay as they are.
"""

from __future__ import annotations

import os

from unitrain.keras_backend import settle_keras

VARIABLES = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # errors only
    "GRPC_VERBOSITY": "ERROR",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # oneDNN's order of sums differs from that of every other backend
    # pyarrow, which Keras imports where it is there, starts a thread, and a process that has some cannot be forked.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

for _name, _value in VARIABLES.items():
    os.environ.setdefault(_name, _value)
settle_keras("tensorflow")
