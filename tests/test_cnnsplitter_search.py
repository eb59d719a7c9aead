"""CNNSplitter's tournament and genetic search against literal forms, and after a kill."""

import json
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import set_jaccard

from modnb.calibrate import calibrate, fit_calibration
from modnb.cnnsplitter.importance import group_kernels, kernel_importance
from modnb.cnnsplitter.outputs import ModuleRunner, composed_logits
from modnb.cnnsplitter.search import (
    CALIBRATED,
    DEMO,
    OURS,
    PAPER,
    RELEASED,
    SHARED,
    Rules,
    breed,
    by_fitness,
    compete,
    crossover,
    draw_by_class,
    draw_groups,
    evaluate_population,
    held_images,
    initial_population,
    mutate,
    mutated_genes,
    next_generation,
    numbered_layers,
    published_rules,
    redraw,
    search,
    shared_genes,
)
from modnb.cnnsplitter.sensitivity import PUBLISHED
from modnb.cnnsplitter.tournament import jaccard_distances, threshold_for, tournament
from modnb.compose import compose, compose_parallel, share_layers
from modnb.data import example_of, load_dataset
from modnb.files import load_tensors, save_tensors
from modnb.lab.results import read_rows
from modnb.lab.running import NotebookFailed, run_notebook
from modnb.locks import Taken, claimed_file
from modnb.masks import ModuleMasks, outline
from modnb.models import create_model
from modnb.prediction import evaluate, predict
from modnb.training import fit

# The tournament, one call for each combination


def call(outputs, labels, members) -> float:
    "Accuracy of a combination {class: individual, ...}, columns in this order, on images of its classes"
    classes = list(members)
    right = images = 0
    for n, label in enumerate(labels.tolist()):
        if label not in classes: continue
        column = [outputs[c, i, n].item() for c, i in members.items()]
        right, images = right + (classes[column.index(max(column))] == label), images + 1
    return right / images


def distance(kernels, members) -> float:
    rows = [kernels[c, i] for c, i in members.items()]
    pairs = [1 - set_jaccard(a, b) for at, a in enumerate(rows) for b in rows[at + 1:]]
    return sum(pairs) / len(pairs)


def literal_tournament(outputs, labels, kernels, order, weights, fewest, most, thresholds, best, whole=None):
    groups = [[{c: i} for i in range(outputs.shape[1])] for c in order]
    while len(groups) > 1:
        following = []
        for at in range(0, len(groups), 2):
            if at + 1 == len(groups):
                following.append(groups[at])
                continue
            tested = []
            for a in groups[at]:
                for b in groups[at + 1]: tested.append((call(outputs, labels, a | b), a | b))
            limit = threshold_for(len(tested[0][1]), thresholds)
            if whole is not None: limit *= call(whole[:, None], labels, dict.fromkeys(tested[0][1], 0))
            tested.sort(key=lambda pair: -pair[0]) # stable
            enough = sum(accuracy >= limit - 1e-9 for accuracy, _ in tested)
            kept = tested[:min(max(enough, fewest), most)]
            if best is not None:
                favourite = next(pair for pair in tested if all(pair[1][c] == best[c] for c in pair[1]))
                if favourite not in kept: kept.append(favourite)
            fit = lambda pair: round(weights[0] * pair[0] + weights[1] * distance(kernels, pair[1]), 12)
            kept.sort(key=lambda pair: -fit(pair))
            following.append([members for _, members in kept])
        groups = following
    return [(call(outputs, labels, members), distance(kernels, members), members) for members in groups[0]]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 11), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(),
       st.booleans())
def test_tournament_equals_one_call_for_each_combination(seed, classes, individuals, levels, favourite, paper, ours):
    random = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (classes,), generator=random)])
    labels = labels[torch.randperm(len(labels), generator=random)]
    outputs = torch.randint(levels + 1, (classes, individuals, len(labels)), generator=random).float() # many ties
    kernels = torch.rand(classes, individuals, 9, generator=random) < 0.6
    order = torch.randperm(classes, generator=random).tolist()
    fewest, most = (3, 3) if paper else (1, 4)
    thresholds = ((2, 0.7), (4, 0.5), (10, 0.3))
    best = torch.randint(individuals, (classes,), generator=random).tolist() if favourite else None
    whole = torch.randint(levels + 1, (classes, len(labels)), generator=random).float() if ours else None
    found = tournament(outputs, labels, kernels, order, 0.93, 0.1, fewest, most, thresholds, best, whole)
    slow = literal_tournament(outputs, labels, kernels, order, (0.93, 0.1), fewest, most, thresholds, best, whole)
    assert found.accuracy.tolist() == pytest.approx([accuracy for accuracy, _, _ in slow])
    assert found.difference.tolist() == pytest.approx([difference for _, difference, _ in slow])
    scores = [0.93 * accuracy + 0.1 * difference for accuracy, difference, _ in slow]
    assert found.scores.tolist() == pytest.approx(scores)
    fitness = torch.zeros(classes, individuals, dtype=torch.float64)
    for score, (_, _, members) in zip(scores, slow):
        for c, i in members.items(): fitness[c, i] = max(fitness[c, i].item(), score)
    torch.testing.assert_close(found.fitness, fitness)
    for members, accuracy in zip(found.members.tolist(), found.accuracy.tolist()): # members are in the order of classes
        assert call(outputs, labels, {c: members[c] for c in order}) == pytest.approx(accuracy)
    if best is not None: assert best in found.members.tolist()


@given(st.integers(0, 10**6), st.integers(1, 40))
def test_distances_equal_sets(seed, block):
    random = torch.Generator().manual_seed(seed)
    first, second = torch.rand(3, 2, 17, generator=random) < 0.4, torch.rand(3, 4, 17, generator=random) < 0.4
    table = jaccard_distances(first.float(), second.float())
    for t in range(3):
        for i in range(2):
            for j in range(4): assert table[t, i, j].item() == pytest.approx(1 - set_jaccard(first[t, i], second[t, j]))


def test_blocks_do_not_matter():
    from modnb.cnnsplitter.tournament import count_pairs

    first, second = torch.randint(4, (7, 50)).float(), torch.randint(4, (5, 50)).float()
    slow = (first[:, None] >= second[None]).sum(2).float()
    for block in (1, 6, 64, 10_000): assert torch.equal(count_pairs(torch.ge, first, second, block), slow)


def test_tournament_refuses_bad_arguments():
    outputs, labels, kernels = torch.rand(3, 4, 9), torch.arange(9) % 3, torch.rand(3, 4, 5) < 0.5
    fine = lambda **changes: tournament(**({"outputs": outputs, "labels": labels, "kernels": kernels} | changes))
    fine()
    for message, changes in {
            "fewest": {"fewest": 0}, "most": {"fewest": 9, "most": 8},
            "thresholds": {"thresholds": ((4, 0.5), (2, 0.5))},
            "images of every class": {"labels": torch.zeros(9).long()}, "order": {"order": [0, 0, 1]},
            "whole": {"whole": outputs[:, 0, 1:]},
            "best": {"best": [0, 0, 4]}, "finite": {"outputs": outputs / 0}, r"\[C, I, N\]": {"labels": labels[1:]},
            "two classes": {"outputs": outputs[:1], "kernels": kernels[:1], "labels": labels * 0}}.items():
        with pytest.raises(ValueError, match=message): fine(**changes)


# Operators


def test_order_of_fitness_is_a_reversed_stable_sort():
    for seed in range(20):
        fitness = torch.randint(3, (2, 7), generator=torch.Generator().manual_seed(seed)).float()
        slow = [sorted(range(7), key=lambda i: row[i].item())[::-1] for row in fitness]
        assert by_fitness(fitness).tolist() == slow


def test_crossover_and_mutation_equal_loops():
    random = torch.Generator().manual_seed(0)
    first, second = (torch.rand(2, 5, 9, generator=random) < 0.5 for _ in range(2))
    cuts = torch.randint(9, (2, 5), generator=random)
    genes = torch.rand(2, 5, 9, generator=random).topk(3, 2).indices
    values = torch.randint(2, (2, 5, 3), generator=random).bool()
    crossed, changed = crossover(first, second, cuts), redraw(first, genes, values)
    for c in range(2):
        for k in range(5):
            cut, expected = int(cuts[c, k]), first[c, k].tolist()
            assert crossed[c, k].tolist() == first[c, k, :cut].tolist() + second[c, k, cut:].tolist()
            for gene, value in zip(genes[c, k].tolist(), values[c, k].tolist()): expected[gene] = value
            assert changed[c, k].tolist() == expected


def test_breeding_without_mutation_is_crossover_alone():
    "Every child is the head of one parent and the tail of the next in order of fitness"
    random = torch.Generator().manual_seed(0)
    population, fitness = torch.rand(3, 10, 30, generator=random) < 0.5, torch.rand(3, 10, generator=random)
    rules = Rules(individuals=10, parents=4, elites=3, mutation_rate=0.0)
    after = breed(population, fitness, rules, random)
    for c in range(3):
        ordered = [population[c, i].tolist() for i in fitness[c].argsort(descending=True).tolist()]
        assert after[c, :3].tolist() == ordered[:3]
        for k, child in enumerate(after[c, 3:].tolist()):
            a, b = ordered[k % 4], ordered[(k + 1) % 4]
            assert any(child == a[:cut] + b[cut:] for cut in range(30)), f"child {k} of class {c}"


def test_two_children_share_their_parents():
    random = torch.Generator().manual_seed(0)
    population, fitness = torch.rand(2, 9, 30, generator=random) < 0.5, torch.rand(2, 9, generator=random)
    rules = replace(PAPER, individuals=9, parents=4, mutation_rate=0.0, fewest=5, most=5)
    after = breed(population, fitness, rules, random)
    assert after.shape == population.shape
    for c in range(2):
        parents = [population[c, i].tolist() for i in fitness[c].argsort(descending=True).tolist()[:4]]
        children = [{(i, j, cut) for i, a in enumerate(parents) for j, b in enumerate(parents) if i != j
                     for cut in range(30) if child == a[:cut] + b[cut:]} for child in after[c].tolist()]
        assert all(children)
        for one, two in zip(children[0:8:2], children[1:8:2]): assert {(j, i, cut) for i, j, cut in one} & two


@pytest.mark.parametrize("mutation, rate, expected", [("flip", 0.1, 0.1), ("redraw", 0.1, 0.05)])
def test_rate_of_mutation(mutation, rate, expected):
    population = torch.zeros(1, 400, 100, dtype=torch.bool)
    rules = Rules(individuals=400, parents=2, elites=1, mutation=mutation, mutation_rate=rate)
    after = breed(population, torch.zeros(1, 400), rules, torch.Generator().manual_seed(0))[:, 1:]
    assert after.float().mean().item() == pytest.approx(expected, abs=0.01)
    if mutation == "redraw": assert after.sum(2).max() <= 10


@given(st.integers(1, 2000), st.sampled_from([0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0]))
def test_genes_that_mutate(genes, rate):
    "A share of the genes, rounded, a half dropped: exact in fractions"
    share = Fraction(str(rate)) * genes
    whole = share.numerator // share.denominator
    assert mutated_genes(rate, genes) == max(1, whole + (share - whole > Fraction(1, 2)))


def test_genes_that_mutate_in_the_published_searches():
    "As its program counts them, which cuts off"
    genes = {"simcnn": 940, "rescnn": 630}
    for network, own in PUBLISHED.items():
        rate, all_of_them = Fraction(str(own["mutation_rate"])), genes[network.split("-")[0]]
        assert mutated_genes(published_rules(network).mutation_rate, all_of_them) == int(rate * all_of_them), network
    bits = torch.zeros(1, 50, 630, dtype=torch.bool)
    assert mutate(bits, published_rules("rescnn-cifar10"), torch.Generator().manual_seed(0)).sum(2).max() <= 31


def test_published_searches_have_the_programs_thresholds_and_goals():
    "Which accuracies a combination has to reach, and below which one it counts for more"
    goals = {name: published_rules(name).accuracy_goal for name in PUBLISHED}
    assert [name for name in goals if goals[name] == 0.95] == ["simcnn-svhn", "simcnn-svhn5"]
    assert {goal for name, goal in goals.items() if not name.startswith("simcnn-svhn")} == {0.9}
    reached = {name: [threshold_for(classes, published_rules(name).thresholds) for classes in (2, 4, 5, 8, 10)]
               for name in PUBLISHED}
    assert reached["simcnn-cifar10"] == reached["simcnn-svhn"] == reached["rescnn-cifar10"]
    assert reached["rescnn-svhn"] == [0.95, 0.95, 0.90, 0.90, 0.85]
    assert reached["simcnn-svhn5"][:3] == reached["rescnn-svhn5"][:3] == [0.95, 0.90, 0.85]
    assert [published_rules(name).individuals for name in PUBLISHED] == [100] * 4 + [50] * 2


@given(st.integers(0, 10**6), st.integers(1, 40), st.sets(st.sampled_from([0.1, 0.29, 0.5, 0.7, 1.0]), min_size=1))
def test_shares_of_the_first_generation(seed, genes, shares):
    drawn = draw_groups(genes, [*shares], 0.1, (2, 15), torch.Generator().manual_seed(seed))
    allowed = {max(1, int(share * genes + 1e-9)) for share in shares}
    assert {*drawn.sum(2).flatten().tolist()} <= allowed


def test_important_groups_are_preferred_as_in_successive_draws():
    "Against a literal draw without replacement, probability proportional to exp(bias * rank)"
    import numpy

    random, weights = numpy.random.default_rng(0), numpy.exp(0.4 * numpy.arange(6)[::-1])
    counted = numpy.zeros(6)
    for _ in range(20_000): counted[random.choice(6, 3, replace=False, p=weights / weights.sum())] += 1
    drawn = draw_groups(6, [0.5], 0.4, (1, 40_000), torch.Generator().manual_seed(0))[0].double().mean(0)
    torch.testing.assert_close(drawn, torch.from_numpy(counted / 20_000), atol=0.02, rtol=0)


# The search


@pytest.fixture(scope="module")
def trained():
    data = load_dataset("digits", valid=0.1)
    data.train, data.valid = data.train.select(range(600)), data.valid.select(range(60))
    model = create_model("vgg12", width=0.125, seed=0)
    fit(model, data, epochs=4, batch_size=64, lr=0.1, schedule="onecycle", device="cpu", evaluate_every=0)
    importance = kernel_importance(model, data.train, min_confidence=0)
    return model, data, group_kernels(importance, data.classes)


@pytest.fixture(scope="module")
def alike(trained):
    "Groups of which the first layers, or all, stand for the same kernels in all classes"
    model, data, _ = trained
    importance = kernel_importance(model, data.train, min_confidence=0)
    return lambda shared: group_kernels(importance, data.classes, shared=shared)


SMALL = Rules(individuals=6, parents=3, elites=2, keep_sensitive=(0.7, 0.8, 0.9), fewest=20, most=40)
SMALL_PAPER = replace(PAPER, individuals=6, parents=3, fewest=20, most=20)
SMALL_OURS = replace(CALIBRATED, individuals=6, parents=3, elites=2, fewest=20, most=20, held_out=0.5, drawn=0.5)
SMALL_SHARED = replace(SHARED, individuals=6, parents=3, elites=2)
PART_SHARED = replace(SMALL_OURS, shared_layers=5)


def rows(result): return [{name: value for name, value in row.items() if name != "seconds"} for row in result.history]


@pytest.mark.parametrize("rules", [SMALL, SMALL_PAPER, SMALL_OURS, SMALL_SHARED],
                         ids=["released", "paper", "calibrated", "shared"])
def test_search_repeats_and_resumes(rules, trained, alike, tmp_path):
    model, data, grouping = trained
    if rules.shared_layers: grouping = alike(rules.shared_layers)
    run = lambda generations, path=None, seed=3: search(
        model, data.valid, grouping, rules, generations=generations, seed=seed, checkpoint=path)
    whole = run(4)
    again, other = run(4), run(4, seed=4)
    for stopped in (0, 2):
        path = tmp_path / f"{stopped}.safetensors"
        run(stopped, path) # as if killed behind this generation
        resumed = run(4, path)
        assert rows(resumed) == rows(whole) and resumed.masks == whole.masks
        assert torch.equal(resumed.population, whole.population) and resumed.generation == whole.generation
        assert rows(run(4, path)) == rows(whole), "nothing is left to do"
    assert rows(again) == rows(whole) and torch.equal(again.population, whole.population)
    assert not torch.equal(other.population, whole.population)


def test_result_is_what_composing_gives(trained):
    model, data, grouping = trained
    result = search(model, data.valid, grouping, SMALL, generations=3)
    assert result.masks.network == outline(model), "another network refuses them"
    answers = composed_logits(model, result.masks, data.valid).argmax(1)
    assert (answers == data.valid.labels).double().mean().item() == pytest.approx(result.accuracy, abs=0.02) # one image
    flat = result.masks.flat()
    pairs = [1 - set_jaccard(flat[a], flat[b]) for a in range(10) for b in range(a)]
    assert result.difference == pytest.approx(sum(pairs) / 45)
    assert result.kernel_retention == pytest.approx(result.history[result.generation]["kernel_retention"])
    eligible = [row["score"] for row in result.history[1:]]
    assert result.generation == 1 + eligible.index(max(eligible))


def test_best_fitness_does_not_fall_while_the_best_stay(trained):
    model, data, grouping = trained
    rules = replace(SMALL, accuracy_goal=None)
    found = [row["fitness"] for row in search(model, data.valid, grouping, rules, generations=5).history]
    assert all(later >= earlier - 1e-12 for earlier, later in zip(found, found[1:]))


def test_relative_goals_ask_for_shares_of_the_networks_own_accuracy(trained):
    model, data, grouping = trained
    reached = evaluate(model, data.valid)
    for relative, goal in ((False, 0.9), (True, 0.9 * reached)):
        found = search(model, data.valid, grouping, replace(SMALL, relative_goals=relative), generations=3).history
        weights = [0.9 + max(0.0, goal - row["accuracy"]) for row in found[:-1]]
        assert [row["accuracy_weight"] for row in found] == pytest.approx([0.9, *weights])
    assert 0 < reached < 1, "else there is nothing to tell them apart by"


def test_nothing_is_run_twice(trained, monkeypatch):
    model, data, grouping = trained
    ran = []
    original = ModuleRunner.__call__

    def counting(self, kernels, classes):
        ran.append(len(classes))
        return original(self, kernels, classes)

    monkeypatch.setattr(ModuleRunner, "__call__", counting)
    runner = ModuleRunner(model, data.valid, grouping.sites)
    population = initial_population(grouping, SMALL, generator=torch.Generator().manual_seed(0))
    population[:, 5] = population[:, 0] # twins
    outputs, number = evaluate_population(runner, grouping, population)
    assert number == sum(ran) == 50 and torch.equal(outputs[:, 5], outputs[:, 0])
    after = population.flip(1).clone()
    after[2, 0, 0] ^= True
    later, number = evaluate_population(runner, grouping, after, (population, outputs))
    assert number == 1 and sum(ran) == 51
    known = torch.ones(10, 6, dtype=torch.bool)
    known[2, 0] = False
    assert torch.equal(later[known], outputs.flip(1)[known])
    torch.testing.assert_close(later[2, 0], runner(grouping.decode(after)[2, :1], [2])[0], rtol=1e-4, atol=1e-4)
    assert evaluate_population(runner, grouping, after, (after, later))[1] == 0


def test_patience_stops(trained):
    model, data, grouping = trained
    everything = replace(SMALL, keep_sensitive=(1.0,), mutation_rate=0.0) # nothing can ever change
    result = search(model, data.valid, grouping, everything, generations=50, patience=2)
    assert len(result.history) == 4 and result.generation == 1 and result.kernel_retention == 1
    assert result.masks == ModuleMasks({s: torch.ones(10, k).bool() for s, k in grouping.sites.items()}, data.classes)


def test_first_generation_of_the_two_presets(trained):
    _, _, grouping = trained
    seeded = lambda: torch.Generator().manual_seed(0)
    draw = lambda rules, **options: initial_population(grouping, rules, generator=seeded(), **options)
    released, paper = draw(RELEASED), draw(PAPER)
    assert all(torch.equal(released[0], other) for other in released[1:])
    assert not torch.equal(paper[0], paper[1])
    first = grouping.segments[0].sites[0]
    few = draw(PAPER, sensitive=[first])
    genes = grouping.sizes[0]
    assert few[:, :, :genes].sum(2).min() >= genes // 2 and few[:, :, genes:].float().mean() < 0.4
    assert draw(replace(RELEASED, initial="random")).float().mean().item() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="segment"): draw(PAPER, sensitive=["nowhere"])


def test_layers_by_their_numbers(trained):
    _, _, grouping = trained
    names = [segment.sites[0] for segment in grouping.segments]
    assert numbered_layers([2, 0], grouping) == [names[2], names[0]] and numbered_layers([], grouping) == []
    for wrong in (-1, len(names)):
        with pytest.raises(ValueError, match=f"there is no {wrong}"): numbered_layers([wrong], grouping)


def test_bad_input(trained, tmp_path):
    model, data, grouping = trained
    run = lambda rules=SMALL, split=data.valid, groups=grouping, **options: search(
        model, split, groups, rules, **({"generations": 1} | options))
    for message, changes in {
            "parents": {"individuals": 2}, "elites": {"parents": 1, "individuals": 1}, "fewest": {"fewest": 0},
            "most": {"most": 3}, "mating": {"mating": "by mail"}, "children": {"children": 3},
            "mutation_rate": {"mutation_rate": 5}, "mutation": {"mutation": "none"}, "initial": {"initial": "zeros"},
            "keep_sensitive": {"keep_sensitive": (70,)}, "thresholds": {"thresholds": ((2, 95.0),)},
            "keep_best": {"elites": 0}, "accuracy_goal": {"accuracy_goal": 95}}.items():
        with pytest.raises(ValueError, match=message): replace(SMALL, **changes)
    with pytest.raises(ValueError, match="no images of 3"): run(split=data.valid.select(data.valid.labels != 3))
    with pytest.raises(ValueError, match="no images"): run(split=data.valid.select([]))
    with pytest.raises(ValueError, match="classes"): run(split=data.valid.subtask([1, 2]))
    with pytest.raises(ValueError, match="generations"): run(generations=-1)
    with pytest.raises(ValueError, match="patience"): run(patience=0)
    with pytest.raises(ValueError, match="segment"): run(sensitive=["nowhere"])
    other = create_model("vgg12", num_classes=4, width=0.125, seed=0)
    with pytest.raises(ValueError, match="4 outputs"): search(other, data.valid, grouping, SMALL)
    alone = group_kernels({s: torch.rand(1, s.kernels).double() for s in grouping.segments}, ["0"])
    with pytest.raises(ValueError, match="two classes"): run(split=data.valid.subtask([0]), groups=alone)
    none = replace(grouping, segments=(), sizes=(), gene_of=grouping.gene_of[:, :0])
    with pytest.raises(ValueError, match="nothing to search"): run(groups=none)


# Beyond the paper


def test_what_is_ours_is_off_in_what_was_published():
    usual = {"relative_goals": False, "matched": False, "held_out": 0.0, "drawn": 1.0, "size_weight": 0.0,
             "size_goal": 0.0, "shared_layers": 0}
    assert set(usual) == {*OURS}
    for rules in (RELEASED, PAPER, DEMO, *map(published_rules, PUBLISHED)):
        assert usual.items() <= asdict(rules).items() and rules.initial == "sensitivity"


@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([0.1, 0.29, 0.5, 1.0]))
def test_a_start_from_the_top_is_the_first_groups(seed, genes, share):
    drawn = draw_groups(genes, [share], float("inf"), (2, 3), torch.Generator().manual_seed(seed))
    count = max(1, int(share * genes + 1e-9))
    assert drawn.tolist() == [[[gene < count for gene in range(genes)]] * 3] * 2


@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_images_are_drawn_from_each_class(seed, share):
    random = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(4), torch.randint(4, (20,), generator=random)])
    first = draw_by_class(labels, 0.5, random)
    for c in range(4):
        own = int((labels == c).sum())
        assert int(first[labels == c].sum()) == max(1, round(0.5 * own))
    others = ~first
    if all((labels[others] == c).any() for c in range(4)):
        drawn = draw_by_class(labels, share, random, others)
        assert not (drawn & first).any() and {*labels[drawn].tolist()} == {0, 1, 2, 3}


def test_images_held_out_have_no_say_in_who_is_fit(trained):
    "Labels of these images are changed: the same individuals survive, other numbers judge them"
    model, data, grouping = trained
    rules, held = replace(SMALL_OURS, accuracy_goal=None), held_images(data.valid, SMALL_OURS, 3)
    whole, found = predict(model, data.valid, precision="float32").T.contiguous(), []
    for wrong in (False, True):
        runner, state = ModuleRunner(model, data.valid, grouping.sites), None
        if wrong: runner.labels = torch.where(held, 9 - runner.labels, runner.labels)
        random = torch.Generator().manual_seed(0)
        for _ in range(3): state = next_generation(runner, grouping, rules, None, state, random, whole, held)
        found.append(state)
    assert torch.equal(found[0].population, found[1].population) and torch.equal(found[0].fitness, found[1].fitness)
    right, changed = ([row["accuracy"] for row in state.history] for state in found)
    assert min(right) > max(changed)


@pytest.mark.parametrize("rules", [SMALL_SHARED, PART_SHARED], ids=["all", "five"])
def test_shared_layers_run_once_are_the_modules_side_by_side(rules, trained, alike):
    model, data, _ = trained
    grouping, example = alike(rules.shared_layers), data.example()
    found = search(model, data.valid, grouping, rules, generations=2)
    layers = len(grouping.segments) if rules.shared_layers == -1 else rules.shared_layers
    sites = [site for segment in grouping.segments[:layers] for site in segment.sites]
    assert all((found.masks.masks[site] == found.masks.masks[site][:1]).all() for site in sites)
    assert torch.equal(found.population[:, :, :shared_genes(grouping, rules)],
                       found.population[:1, :, :shared_genes(grouping, rules)].expand(10, -1, -1))
    beside = compose_parallel(model, found.masks, data.classes, example)
    shared, size = share_layers(beside), lambda network: sum(p.numel() for p in network.parameters())
    torch.testing.assert_close(shared(example), beside(example), rtol=1e-5, atol=1e-5)
    assert size(shared) < size(beside)
    if rules.shared_layers == -1:
        union = compose(model, found.masks, data.classes, example)
        torch.testing.assert_close(union(example), beside(example), rtol=1e-4, atol=1e-4)
        assert size(union) <= size(model)
    logits = composed_logits(model, found.masks, data.valid)
    held = held_images(data.valid, rules, 0)
    judges = slice(None) if held is None else held
    right = found.calibration(logits).argmax(1) == data.valid.labels
    assert right[judges].double().mean().item() == pytest.approx(found.accuracy, abs=0.05)


def test_groups_of_single_classes_are_not_shared(trained, alike):
    model, data, grouping = trained
    with pytest.raises(ValueError, match=r"group_kernels\(..., shared=-1\)"):
        search(model, data.valid, grouping, SMALL_SHARED, generations=1)
    with pytest.raises(ValueError, match="at most the 9 layers, not 10"):
        search(model, data.valid, alike(-1), replace(SMALL_SHARED, shared_layers=10), generations=1)


def test_matched_logits_are_lines_of_their_own(trained):
    "Against numpy's straight line, on the images that are not held out"
    import numpy

    random = torch.Generator().manual_seed(0)
    outputs, whole = torch.randn(2, 3, 12, generator=random), torch.randn(2, 12, generator=random)
    held = torch.arange(12) % 3 == 0
    found = compete(outputs, whole, SMALL_OURS, held)
    for c in range(2):
        for i in range(3):
            line = numpy.polyfit(outputs[c, i, ~held].numpy(), whole[c, ~held].numpy(), 1)
            expected = torch.from_numpy(numpy.polyval(line, outputs[c, i].numpy())).float()
            torch.testing.assert_close(found[c, i], expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_calibration_of_two_modules_has_a_closed_form(counts):
    "One module says 0 or 1, the other nothing: the shares of the two classes among these images are met exactly"
    said = torch.tensor([0., 0, 1, 1]).repeat_interleave(torch.tensor(counts))
    labels = torch.tensor([0, 1, 0, 1]).repeat_interleave(torch.tensor(counts))
    found = fit_calibration(torch.stack([said, torch.zeros_like(said)], 1), labels, decay=0)
    odds = torch.tensor(counts).double().log()
    at_zero, at_one = odds[0] - odds[1], odds[2] - odds[3]
    torch.testing.assert_close(found.shift[0] - found.shift[1], at_zero, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scale[0], at_one - at_zero, rtol=0, atol=1e-3)


def test_calibrated_modules_have_scaled_logits(trained):
    model, data, grouping = trained
    masks = search(model, data.valid, grouping, SMALL, generations=0).masks
    beside = compose_parallel(model, masks, data.classes, data.example())
    logits = beside(example_of(data.train, 200))
    wanted = fit_calibration(composed_logits(model, masks, data.train), data.train.labels)(logits)
    torch.testing.assert_close(calibrate(beside, data.train)(example_of(data.train, 200)), wanted,
                               rtol=1e-2, atol=1e-2)


def test_neurons_of_linear_layers_are_searched(trained):
    model, data, _ = trained
    importance = kernel_importance(model, data.train, min_confidence=0, linear=True)
    grouping = group_kernels(importance, data.classes)
    plain = [segment for segment in importance if "classifier" not in segment.sites[0]]
    assert len(importance) == len(plain) + 2 and list(importance)[:len(plain)] == plain
    masks = search(model, data.valid, grouping, SMALL, generations=1).masks
    assert 0 < masks.masks[list(importance)[-1].sites[0]].double().mean() < 1
    beside = compose_parallel(model, masks, data.classes, data.example())
    x = example_of(data.valid, 20)
    torch.testing.assert_close(beside(x), composed_logits(model, masks, data.valid)[:20], rtol=1e-3, atol=1e-3)


def test_a_size_that_is_not_reached(trained):
    model, data, grouping = trained
    rules = replace(SMALL, size_weight=0.5, size_goal=0.05)
    with pytest.warns(UserWarning, match="no generation keeps at most 5% of the kernels; the nearest keeps"):
        found = search(model, data.valid, grouping, rules, generations=2)
    smallest = min(row["kernel_retention"] for row in found.history[1:])
    assert not found.reached and found.kernel_retention == pytest.approx(smallest)
    easy = search(model, data.valid, grouping, replace(rules, size_goal=0.95), generations=1)
    assert easy.reached and easy.kernel_retention <= 0.95


def test_a_network_that_knows_nothing_is_named(trained):
    _, data, grouping = trained
    fresh = create_model("vgg12", width=0.125, seed=5)
    with pytest.warns(UserWarning, match="of the images of the search, of 10 classes, so its modules cannot be better"):
        search(fresh, data.valid, grouping, SMALL, generations=0)


def test_bad_input_of_what_is_ours(trained):
    model, data, grouping = trained
    for message, changes in {"held_out": {"held_out": 1.0}, "drawn": {"drawn": 0.0}, "size_weight": {"size_weight": 2},
                             "size_goal": {"size_goal": -0.1}, "shared_layers": {"shared_layers": -2},
                             "initial": {"initial": "bottom"}}.items():
        with pytest.raises(ValueError, match=message): replace(SMALL, **changes)
    one = data.valid.select([int((data.valid.labels == c).nonzero()[0]) for c in range(10)])
    with pytest.raises(ValueError, match="there is one of 0, 1, 2"):
        search(model, one, grouping, replace(SMALL, held_out=0.5), generations=0)
    with pytest.raises(ValueError, match="no images of 3"):
        search(model, data.valid.select(data.valid.labels != 3), grouping, SMALL_OURS, generations=0)


def test_the_state_of_a_search_belongs_to_one_process(trained, tmp_path):
    model, data, grouping = trained
    state = tmp_path / "state.safetensors"
    with claimed_file(state), pytest.raises(Taken, match="state.safetensors is being worked on by process"):
        search(model, data.valid, grouping, SMALL, generations=0, checkpoint=state)
    search(model, data.valid, grouping, SMALL, generations=0, checkpoint=state)
    assert [path.name for path in tmp_path.iterdir()] == [state.name]


def test_checkpoint_of_another_search_is_refused(trained, tmp_path):
    model, data, grouping = trained
    path = tmp_path / "search.safetensors"
    search(model, data.valid, grouping, SMALL, generations=0, checkpoint=path)
    content = path.read_bytes()
    again = lambda rules=SMALL, split=data.valid, network=model, **options: search(
        network, split, grouping, rules, generations=1, checkpoint=path, **options)
    with pytest.raises(ValueError, match="seed was 0 and is 1"): again(seed=1)
    with pytest.raises(ValueError, match="mutation_rate"): again(replace(SMALL, mutation_rate=0.5))
    with pytest.raises(ValueError, match="images"): again(split=data.valid.select(range(len(data.valid) - 1)))
    with pytest.raises(ValueError, match="model"): again(network=create_model("vgg12", width=0.125, seed=1))
    assert path.read_bytes() == content
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="damaged"): again()


def test_checkpoint_from_before_there_were_relative_goals(trained, tmp_path):
    "A file that does not say what the precision was and what goals were means what it meant then"
    model, data, grouping = trained
    path, run = tmp_path / "search.safetensors", lambda *rules, **options: search(
        model, data.valid, grouping, *(rules or (SMALL,)), generations=2, checkpoint=path, **options)
    search(model, data.valid, grouping, SMALL, generations=1, checkpoint=path)
    tensors, header = load_tensors(path, "search")
    for name in ("precision", "relative_goals"): del header["about"][name]
    save_tensors(path, tensors, "search", {name: header[name] for name in ("about", "history", "generation")})
    content = path.read_bytes()
    with pytest.raises(ValueError, match="relative_goals was False"): run(replace(SMALL, relative_goals=True))
    with pytest.raises(ValueError, match="precision was 'float32'"): run(precision="bfloat16")
    assert path.read_bytes() == content
    assert rows(run()) == rows(search(model, data.valid, grouping, SMALL, generations=2)), "it goes on"


# The experiment

NOTEBOOKS = Path(__file__).parents[1] / "nbs/experiments"
FEW = {"search_images": 60, "importance_images": 300, "generations": 1, "sizes": "2", "subtasks_per_size": 1,
       "count_operations": False, "sensitivity_shares": "0.1,1"}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "A small network, trained by the notebook with the epoch that is best on the images held out"
    folder = tmp_path_factory.mktemp("network")
    small = {"epochs": 3, "train_limit": 400, "test_limit": 100, "valid": 0.2, "out": str(folder)}
    run_notebook(NOTEBOOKS / "train.ipynb", folder / "train.ipynb",
                 small | {"keep": "best", "normalisation": "imagenet"})
    return folder


def searched(network, folder, **settings) -> tuple[dict, dict, dict]:
    "Rules that the search was made with, settings of its rows, and its numbers for all classes"
    run_notebook(NOTEBOOKS / "cnnsplitter_search.ipynb", folder / "search.ipynb",
                 FEW | settings | {"run": str(network), "out": str(folder)})
    (checkpoint,) = folder.glob("search-*.safetensors")
    about, found = load_tensors(checkpoint, "search")[1]["about"], read_rows(folder / "rows.csv")
    values = found[(found.classes == "all") & (found.split != "valid")].set_index("metric").value.to_dict()
    return about, json.loads(found.config[0]), values


def plain(rules): return json.loads(json.dumps(asdict(rules)))


def test_the_paper_is_the_paper(network, tmp_path):
    "Nothing that the set of rules says is overwritten by a default; what is given is taken"
    few = {"population": 6, "parents": 4, "fewest": 20, "most": 20}
    about, config, _ = searched(network, tmp_path, rules="paper", **few)
    wanted = plain(replace(PAPER, individuals=6, parents=4, fewest=20, most=20))
    assert wanted.items() <= about.items()
    assert {"rules": "paper", "elites": 0, "mutation_rate": 0.1, "accuracy_goal": 0.0, "initial_bias": 0.0,
            "keep_sensitive": "0.5,0.6,0.7,0.8,0.9"}.items() <= config.items()
    assert "sensitive_layers" not in config, "those that the rule finds"


def test_a_configuration_has_the_programs_choices(network, tmp_path):
    few = {"population": 6, "parents": 4, "elites": 2}
    about, config, values = searched(network, tmp_path, rules="released", configuration="rescnn-svhn5", **few)
    wanted = plain(replace(published_rules("rescnn-svhn5"), individuals=6, parents=4, elites=2))
    assert wanted.items() <= about.items() and about["sensitive"] == ["features.conv4", "features.conv6"]
    assert config["sensitive_layers"] == "3,5" and config["combination_thresholds"] == "2:0.95,4:0.9,5:0.85"
    assert "configuration" not in config and config["keep"] == "best" and config["normalisation"] == "imagenet"
    assert 0 < values["cohesion"] <= 1 and values["generations"] in (0, 1)
    assert values["modularizing_time"] <= values["search_time"] < values["total_time"]


def test_searches_with_nothing_new_are_recorded_as_before(network, tmp_path):
    "Rows of one study from before and after there were more choices have the same settings"
    _, config, _ = searched(network, tmp_path)
    former = FEW | {
        "rules": "released", "population": 6, "parents": 3, "elites": 2, "patience": 20, "fewest": 50, "most": 100,
        "mutation_rate": 0.05, "keep_sensitive": "0.7,0.8,0.9", "keep_insensitive": "0.4,0.5,0.6,0.7",
        "initial_bias": 0.1, "grouping": "importance", "relative_goals": False, "start": "sensitivity",
        "min_confidence": 0.0, "fewest_sure": 0, "search_seed": 0, "subtask_seed": 1, "how": "auto",
        "search_precision": "float32"}
    training = json.loads(read_rows(network / "rows_train.csv").config[0])
    assert config == training | former


def test_a_network_that_nobody_searched_has_no_configuration(network, tmp_path):
    with pytest.raises(NotebookFailed, match="no published search 'vgg12-digits'. There is: simcnn-cifar10"):
        searched(network, tmp_path, configuration="published")
