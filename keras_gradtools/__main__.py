"""The command line: `python -m keras_gradtools report MODEL.keras DATA.npz`."""

import sys

from keras_gradtools.diagnostics.model_report.command_line import main

if __name__ == "__main__":
    sys.exit(main())
