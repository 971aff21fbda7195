"""The rival without learning: the mean of the teachers' weights.

python -m recipes.post_training.average OUT TEACHER TEACHER [...]
"""

import sys

from openkeye.distill.weight_average import write_average

if __name__ == "__main__":
    write_average(sys.argv[2:], sys.argv[1])
    print(sys.argv[1])
