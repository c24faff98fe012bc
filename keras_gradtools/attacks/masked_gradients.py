"""Signs that a model hides its gradients from attacks, and only seems robust."""

TOLERANCE = 0.01


def signs_of_masking(pgd, fgsm, noise, huge, chance):
    """Sentences on what a model cannot do whose gradients lead to its errors; empty where nothing is wrong.

    Args:
        pgd: the accuracy under PGD at each strength, a dict.
        fgsm: the accuracy under FGSM at the same strengths.
        noise: that under random noise of the same strengths.
        huge: the accuracy under PGD at a strength that can turn any example into any other.
        chance: the accuracy of a guess.
    """
    signs = []
    for epsilon, accuracy in pgd.items():
        if accuracy > fgsm[epsilon] + TOLERANCE:
            signs.append(
                f"at strength {epsilon:g}, one step (FGSM, accuracy {fgsm[epsilon]:.1%}) does more harm than many "
                f"(PGD, {accuracy:.1%})"
            )
        if accuracy > noise[epsilon] + TOLERANCE:
            signs.append(
                f"at strength {epsilon:g}, random noise (accuracy {noise[epsilon]:.1%}) does more harm than the "
                f"gradient (PGD, {accuracy:.1%})"
            )
    if huge > chance + TOLERANCE:
        signs.append(
            f"an accuracy of {huge:.1%} is left under an attack that may replace the example, where a guess has "
            f"{chance:.1%}"
        )
    return signs
