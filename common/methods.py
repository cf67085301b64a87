"""The methods: what each one's perturbation ascends, and the settings that the method has.

A new perturbation is a function here and a row of ``METHODS``. The function gets a run's settings,
training loss and optimizer. It returns what the perturbation ascends, a function of model, inputs
and labels that returns a scalar.
"""

from common.errors import InputError
from sam_obf import OutputBiasForgetting, momentum_perturbation, random_perturbation


def loss(args, criterion, optimizer):
    """Steepest ascent: the training loss."""
    return lambda model, images, labels: criterion(model(images), labels)


def obf(args, criterion, optimizer):
    """Output bias forgetting."""
    forget = OutputBiasForgetting(args.gamma, args.lam, args.link)
    return lambda model, images, labels: forget(model(images), labels)


def noise(args, criterion, optimizer):
    """Gaussian noise, which knows neither images nor labels."""

    def ascend(model, images, labels):
        model(images)  # moves batch norm's statistics, at the weights as they are
        return random_perturbation(model.parameters())

    return ascend


def momentum(args, criterion, optimizer):
    """The base optimizer's momentum.

    Raises:
        InputError: now or when it is called, the base optimizer keeps none.
    """

    def ascend(*_):
        try:
            return momentum_perturbation(optimizer)
        except ValueError as error:
            raise InputError(f"method momentum does not go with opt {args.opt}: {error}") from error

    ascend()
    return ascend


# Settings of the methods, with their defaults.
SAM = {"rho": 0.05, "rho_min": None, "perturb_interval": 1}
PART = {"perturb_fraction": 1.0}
OBF = {"gamma": 1.0, "lam": None, "link": "sigmoid"}
ASAM = {"adaptive": "both"}
GSAM = {"gsam_alpha": 0.4, "gsam_normalize": False}

# What is ascended, and the settings. To give one of these settings to another method is an error.
METHODS = {
    "base": (None, {}),
    "sam": (loss, SAM | PART),
    "obf": (obf, SAM | PART | OBF),
    "random": (noise, SAM),
    "momentum": (momentum, SAM),
    "gsam": (loss, SAM | PART | GSAM),
    "asam": (loss, SAM | PART | ASAM),
    "gsam+obf": (obf, SAM | PART | OBF | GSAM),
    "asam+obf": (obf, SAM | PART | OBF | ASAM),
}
