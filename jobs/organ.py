"""Organs on the cluster this job runs on: ray job submit --working-dir . -- python jobs/organ.py compare RECIPE [KEY=VALUE ...]"""

import sys

from transplant_ray.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["organ"]
    main()
