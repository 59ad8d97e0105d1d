# Copyright 2026 The hf_scan authors. Licensed under the Apache License, Version 2.0.
"""Search thresholds as the paper does, with a genetic algorithm: [`genetic_search`]."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pygad
from tqdm.auto import tqdm

from .frontier import possible_thresholds
from .policy import check_table, evaluate_policies


@dataclass(frozen=True)
class GeneticSearchResult:
    """
    The result of [`genetic_search`].

    Args:
        thresholds (`list[float]`): One per column. The last is 0.0, as it answers every sample that reaches it.
        accuracy (`float`): In [0, 1], on the scores that were searched on.
        cost (`float`): Mean cost there.
        fitness (`float`): The best fitness.
        history (`list[float]`): The best fitness after each generation.
    """

    thresholds: list[float]
    accuracy: float
    cost: float
    fitness: float
    history: list[float]


def genetic_search(
    confidences: np.ndarray,
    correct: np.ndarray,
    costs: np.ndarray,
    *,
    plain_cost: float | None = None,
    beta: float = 0.5,
    baseline_accuracy: float | None = None,
    threshold_range: float = 0.3,
    bits: int = 30,
    population_size: int = 50,
    generations: int = 100,
    crossover_probability: float = 0.9,
    mutated_bits: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> GeneticSearchResult:
    """
    Search the thresholds with the largest fitness, `acceleration + beta * (accuracy - baseline)`, where the
    acceleration is the plain network's cost over the mean cost, and accuracies are in points.

    Each threshold has a gene of `bits` bits. It is `1 - threshold_range * mean(bits)`, moved halfway between the two
    scores around it ([`possible_thresholds`]), so that rounding moves no sample across. Parents are selected by
    tournament and crossed at two points, `mutated_bits` bits of each child are flipped, and the best policy is kept.

    Source: the genetic algorithm of SCAN (Zhang et al., NeurIPS 2019), with the encoding and the fitness of a
    published re-implementation; one gene per classifier.

    Args:
        confidences (`np.ndarray` of shape `(n, columns)`): Confidence of each possible answer, shallow to deep. A
            sample whose confidence is above no threshold is answered by the last column.
        correct (`np.ndarray` of shape `(n, columns)`): Whether each answer is right.
        costs (`np.ndarray` of shape `(columns,)`): Cumulative cost of each answer.
        plain_cost (`float`, *optional*): Cost of the network without early exits. Defaults to the last column's.
        beta (`float`, *optional*, defaults to 0.5): Acceleration that a point of accuracy is worth.
        baseline_accuracy (`float`, *optional*): In [0, 1]. Defaults to the last column's.
        threshold_range (`float`, *optional*, defaults to 0.3): Thresholds lie in [1 - threshold_range, 1].
        bits (`int`, *optional*, defaults to 30): Bits of a gene.
        population_size (`int`, *optional*, defaults to 50): Policies in a generation.
        generations (`int`, *optional*, defaults to 100): Generations.
        crossover_probability (`float`, *optional*, defaults to 0.9): Share of children with two parents.
        mutated_bits (`int`, *optional*, defaults to 1): Bits flipped in each child.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same thresholds.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        [`GeneticSearchResult`]

    Raises:
        `ValueError`: if the arrays do not belong together, are empty, or hold NaN, if confidences are not in [0, 1] or
            costs decrease with depth, or if a setting is out of range.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_scan.calibration import genetic_search

    >>> confidences = np.array([[0.99, 1.0], [0.75, 1.0]])
    >>> correct = np.array([[True, True], [False, True]])
    >>> found = genetic_search(confidences, correct, np.array([0.5, 1.0]), progress=False)
    >>> 0.75 <= found.thresholds[0] < 0.99, found.accuracy, found.cost
    (True, 1.0, 0.75)
    ```
    """
    confidences, correct, costs = check_table(confidences, correct, costs)
    _check_confidences(confidences)
    genes = confidences.shape[1] - 1
    plain_cost = float(costs[-1]) if plain_cost is None else plain_cost
    limits = (
        ("plain_cost", plain_cost, 0, float("inf")),
        ("beta", beta, 0, float("inf")),
        ("threshold_range", threshold_range, 0, 1),
        ("bits", bits, 1, float("inf")),
        ("population_size", population_size, 2, float("inf")),
        ("generations", generations, 1, float("inf")),
        ("crossover_probability", crossover_probability, 0, 1),
        ("mutated_bits", mutated_bits, 0, genes * bits),
    )
    _check_settings(limits)
    baseline = correct[:, -1].mean() if baseline_accuracy is None else baseline_accuracy
    between_scores = _between_scores(confidences[:, :genes], round(1 - threshold_range, 10))

    def decode(solutions: np.ndarray) -> np.ndarray:
        shares = np.reshape(solutions, (-1, genes, bits)).mean(axis=-1)
        return between_scores(np.round(1 - threshold_range * shares, 10))

    def fitness(algorithm: pygad.GA, solutions: np.ndarray, indices: object) -> list[float]:
        accuracy, cost = evaluate_policies(confidences, correct, costs, decode(np.asarray(solutions)))
        return (plain_cost / cost + beta * 100 * (accuracy - baseline)).tolist()

    solution, best, history = _evolve(
        fitness,
        genes * bits,
        population_size=population_size,
        generations=generations,
        crossover_probability=crossover_probability,
        mutated_bits=mutated_bits,
        seed=seed,
        progress=progress,
    )
    thresholds = decode(solution)
    accuracy, cost = evaluate_policies(confidences, correct, costs, thresholds)
    return GeneticSearchResult([*thresholds[0].tolist(), 0.0], float(accuracy[0]), float(cost[0]), best, history)


def _evolve(
    fitness: Callable[[pygad.GA, np.ndarray, object], list[float]],
    bits: int,
    *,
    population_size: int,
    generations: int,
    crossover_probability: float,
    mutated_bits: int,
    seed: int,
    progress: bool,
) -> tuple[np.ndarray, float, list[float]]:
    """Run the genetic algorithm; return the best bits, their fitness and the best fitness after each generation."""
    history: list[float] = []
    with tqdm(total=generations, desc="genetic threshold search", disable=not progress, leave=False) as bar:

        def advance(algorithm: pygad.GA) -> None:
            history.append(float(np.max(algorithm.last_generation_fitness)))
            bar.update()
            bar.set_postfix(fitness=f"{history[-1]:.3f}")

        algorithm = pygad.GA(
            num_generations=generations,
            num_parents_mating=max(2, population_size // 2),
            fitness_func=fitness,
            fitness_batch_size=population_size,
            sol_per_pop=population_size,
            num_genes=bits,
            gene_type=int,
            gene_space=[0, 1],
            parent_selection_type="tournament",
            keep_elitism=1,
            crossover_type="two_points",
            crossover_probability=crossover_probability,
            mutation_type="random",
            mutation_num_genes=mutated_bits,
            on_generation=advance,
            random_seed=seed,
            suppress_warnings=True,
        )
        algorithm.run()
    solution, best, _ = algorithm.best_solution(pop_fitness=algorithm.last_generation_fitness)
    return np.asarray(solution), float(best), history


def _check_confidences(confidences: np.ndarray) -> None:
    if confidences.shape[1] == 1:
        raise ValueError("`confidences` has one column; expected two or more, as the last has no threshold.")
    if confidences.min() < 0 or confidences.max() > 1:
        raise ValueError(
            f"`confidences` lie between {confidences.min():.3g} and {confidences.max():.3g}; thresholds are searched "
            "in [0, 1]. Rescale them to it."
        )


def _check_settings(limits: Iterable[tuple[str, float, float, float]]) -> None:
    """Check that numbers, given by name, are finite and between two others."""
    for name, value, least, most in limits:
        if not (least <= value <= most and value < float("inf")):
            raise ValueError(f"`{name}` is {value}; expected a number from {least} to {most}.")


def _between_scores(confidences: np.ndarray, lowest: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that moves thresholds, `(policies, columns)`, halfway between the scores they lie between."""
    possible = [
        (np.unique([lowest, *scores[scores > lowest]]).astype(np.float64), possible_thresholds(scores, low=lowest))
        for scores in confidences.T
    ]

    def move(thresholds: np.ndarray) -> np.ndarray:
        moved = np.ones_like(thresholds)
        for column, (values, middles) in enumerate(possible):
            # A threshold on a score exits only the samples above it, as one halfway to the next score does.
            place = np.searchsorted(middles, values[np.searchsorted(values, thresholds[:, column], side="right") - 1])
            moved[:, column] = np.where(thresholds[:, column] < 1, middles[place], 1.0)
        return moved

    return move
