"""The sentences at the top of a report, made from its numbers: what was read, what it licenses, what came out.

A sentence may only say what a number beside it says. The even part of a gated layer without biases is exactly c B,
whatever the data; how much of the layer that part is, is the ladder's business.
"""

from typing import Any

HIGH, LOW = 0.8, 0.5  # of R^2: above, eigenvectors speak for most of the layer; below, for too little of it


def figure(value: float | None, digits: int = 3) -> str:
    """A number in running text."""
    return "unknown" if value is None else f"{value:.{digits}f}".replace("-", "−")


def summary(report: dict[str, Any]) -> list[str]:
    """A few sentences in plain words."""
    parts = [_subject(report), _ladder(report), _module(report), _spectra(report)]
    return [part for part in parts if part]


def _subject(report: dict[str, Any]) -> str:
    mlp, module = report["mlp"], report["module"]
    what = "gated" if mlp["gated"] else "ungated"
    text = (
        f"Layer {report['layer']} of {report['model']} is {'an' if what[0] == 'u' else 'a'} {what} MLP "
        f"({mlp['activation']}) of {mlp['width']:,} neurons, from {mlp['d_in']:,} dimensions to {mlp['d_out']:,}."
    )
    if module is None:
        return text + " This page takes the untouched MLP apart."
    return text + (
        f" It was replaced by {module['kind']} ({module['init']} initialisation) with {module['width']:,} components; "
        f"this page reads the {'trained' if report['tensor'] == 'trained' else 'original'} weights."
    )


def _ladder(report: dict[str, Any]) -> str:
    r2 = {rung["name"]: rung["r2"] for rung in report["ladder"]["rungs"]}
    tokens = report["ladder"]["held_out_tokens"]
    text = f"On {tokens:,} held-out tokens the best affine map reaches R² {figure(r2['affine'])}"
    if "mean-gate" not in r2:
        return text + "; an ungated MLP has no bilinear map to compare with it."
    both, affine = r2["mean-gate + affine"], r2["affine"]
    gain = None if both is None or affine is None else both - affine
    return text + (
        f", the bilinear map with constant gates {figure(r2['mean-gate'])}, and both together "
        f"{figure(both)}: {figure(gain)} above the affine map alone."
    )


def _module(report: dict[str, Any]) -> str:
    module = report["module"]
    if module is None:
        return ""
    metrics = module["metrics"]
    text = f"The trained module leaves a fraction {figure(metrics.get('fvu'), 4)} of the variance unexplained"
    text += f" with {figure(metrics['l0'], 1)} active components per token" if "l0" in metrics else ""
    if not module["similarity"]:
        return text + "; it has no quadratic form of its own."
    rows = module["similarity"][0]
    return text + (
        f"; its tensor has cosine {figure(rows['cosine'], 4)} to the original one, "
        f"{figure(rows['distance_at_best_scale'], 4)} of the norm away at the best scale."
    )


def _spectra(report: dict[str, Any]) -> str:
    hosvd = report["hosvd"]
    if hosvd is None:
        return ""
    return (
        f"Half of the tensor's squared norm lies in {hosvd['for_half']:,} of {len(hosvd['sigma']):,} output directions; "
        f"random weights of the same shape need {hosvd['null_for_half']:,}."
    )


def licence(report: dict[str, Any]) -> list[str]:
    """What the ladder allows a reader to say about eigenvectors."""
    r2 = {rung["name"]: rung["r2"] for rung in report["ladder"]["rungs"]}
    if report["tensor"] is None:
        return ["Neither this MLP nor the module has a quadratic form, so nothing on this page is about eigenvectors."]
    whose = "trained components' sum" if report["tensor"] == "trained" else "layer"
    texts = [_exact(report["mlp"], whose)]
    if report["mlp"]["activation"] != "identity":
        texts.append(_alone(r2["half"]))
    if report["tensor"] == "trained":
        texts.append(_verdict("With constant gates the trained tensor, whose eigenvectors are shown,", r2["trained"]))
        return [*texts, f"The original layer's own tensor reaches {figure(r2['mean-gate'])} that way."]
    return [*texts, _verdict("With constant gates the form", r2["mean-gate"])]


def _exact(mlp: dict[str, Any], whose: str) -> str:
    if mlp["activation"] == "identity":
        return f"The {whose} is bilinear: its quadratic form is all of it, but for biases."
    if mlp["input_biases"]:
        return f"The gate or up projection has a bias, so the form is not exactly the even part of the {whose} in x."
    return f"Eigenvectors describe the even part of the {whose}, (y(x) + y(−x))/2, exactly and for every input."


def _alone(half: float | None) -> str:
    if half is None or half >= 0:
        return (
            f"Alone, with nothing fitted, the original layer's even part reaches R² {figure(half)} on held-out tokens."
        )
    return (
        f"Alone the original layer's even part is no model of it on real tokens: R² of ‘half’ is {figure(half)}, worse than the "
        "mean output. Where gates are mostly negative the odd part cancels it."
    )


def _verdict(what: str, r2: float | None) -> str:
    if r2 is None:
        return f"{what} could not be measured."
    if r2 >= HIGH:
        return f"{what} reaches R² {figure(r2)}: its eigenvectors speak for most of the layer."
    if r2 >= LOW:
        return f"{what} reaches R² {figure(r2)}: its eigenvectors are a partial account of the layer."
    return (
        f"{what} reaches R² {figure(r2)}: do not read its eigenvectors as the layer's features; they are features of "
        "the weights, and the contexts below show where the data meets them."
    )
