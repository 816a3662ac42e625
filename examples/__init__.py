"""The paper's applications, and what came of running them."""
