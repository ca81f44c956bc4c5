import sys

from seqkernels.cli import main

sys.exit(main())
