"""Train several networks side by side on arrays of one's own: `fit` is all of the trainer."""

import numpy as np

from core.data import Dataset
from core.train import TrainConfig, fit

rng = np.random.default_rng(0)
x = rng.normal(size=(600, 20)).astype(np.float32)  # one example per row
y = (x[:, 0] * x[:, 1] > 0).astype(int)  # labels from 0 up; no line separates these two classes

data = Dataset.from_arrays(train=(x[:500], y[:500]), validation=(x[500:], y[500:]), normalise="standard")
configs = [TrainConfig(hidden_sizes=(32,), eta=eta, momentum=0.9, epochs=30) for eta in (0.001, 0.01, 0.1)]

for result in fit(configs, data, seed=1):
    print(f"eta {result.config.eta}: {result.history[-1].metrics['accuracy/val']:.2f} of the validation examples right")
