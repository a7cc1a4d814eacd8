"`python -m subnet_explorer`, the same as the command `subnet-explorer`."
import sys

from subnet_explorer.cli import main

if __name__ == "__main__": sys.exit(main())
