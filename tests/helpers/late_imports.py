"""What a run imports when it begins, seconds of it: imported once, before processes are forked."""

import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401
