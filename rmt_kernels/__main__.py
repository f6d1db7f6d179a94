"""``python -m rmt_kernels``."""

from rmt_kernels.cli import main

raise SystemExit(main())
