"""Signs of gradient masking: a model that resists gradient attacks only because its gradients are uninformative."""

TOLERANCE = 0.01


def signs_of_masking(pgd, fgsm, noise, huge, chance):
    """The signs of gradient masking that the accuracies show, one sentence each. Empty if there are none.

    An accuracy counts as higher than another if it exceeds it by more than one percentage point.

    Args:
        pgd: A dict with the accuracy under PGD for each strength.
        fgsm: A dict with the accuracy under FGSM for the same strengths.
        noise: A dict with the accuracy under random noise of the same strengths.
        huge: The accuracy under PGD at a strength that can turn any example into any other.
        chance: The accuracy of guessing.
    """
    signs = []
    for epsilon, accuracy in pgd.items():
        if accuracy > fgsm[epsilon] + TOLERANCE:
            signs.append(
                f"at strength {epsilon:g}, one step (FGSM, accuracy {fgsm[epsilon]:.1%}) does more harm than many "
                f"(PGD, accuracy {accuracy:.1%})"
            )
        if accuracy > noise[epsilon] + TOLERANCE:
            signs.append(
                f"at strength {epsilon:g}, random noise (accuracy {noise[epsilon]:.1%}) does more harm than the "
                f"gradient (PGD, accuracy {accuracy:.1%})"
            )
    if huge > chance + TOLERANCE:
        signs.append(
            f"under an attack that may replace the whole example, the accuracy is {huge:.1%}, above the {chance:.1%} "
            "of guessing"
        )
    return signs
