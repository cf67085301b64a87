"""Search rho and lr with Optuna, on scikit-learn's digits: ``python optuna_search.py [STORAGE]``.

Workers that share a storage share the search: start several with ``sqlite:///search.db``, or on
several machines with the URL of a database, as Optuna takes it.
"""

import sys

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn

from sam_obf import SAM, OutputBiasForgetting

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
labels = torch.tensor(digits.target)
train, validation, test = slice(0, 900), slice(900, 1200), slice(1200, None)
EPOCHS, TRIALS = 20, 15


def objective(trial, held_out=validation):
    """Accuracy on the held-out images after the last epoch."""
    rho = trial.suggest_float("rho", 0.01, 1.0, log=True)
    lr = trial.suggest_float("lr", 0.001, 1.0, log=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    loss_fn, forget = nn.CrossEntropyLoss(), OutputBiasForgetting(gamma=1.0)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), model, rho=rho)
    for epoch in range(EPOCHS):
        for batch in torch.randperm(900).split(50):
            x, y = images[train][batch], labels[train][batch]
            with optimizer.perturbed(lambda: forget(model(x), y)):
                loss_fn(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            right = model(images[held_out]).argmax(-1) == labels[held_out]
        trial.report(right.float().mean().item(), epoch)
        if trial.should_prune():  # it is behind most trials before it at the same epoch
            raise optuna.TrialPruned
    return right.float().mean().item()


storage = sys.argv[1] if len(sys.argv) > 1 else None  # None: in memory
sampler = optuna.samplers.TPESampler(n_startup_trials=5)
pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
options = {"study_name": "digits", "direction": "maximize", "load_if_exists": True}
study = optuna.create_study(storage=storage, sampler=sampler, pruner=pruner, **options)
study.optimize(objective, n_trials=TRIALS)
print(f"best of {len(study.trials)} trials: {study.best_params}")
print(f"test accuracy {objective(optuna.trial.FixedTrial(study.best_params), test):.2%}")
