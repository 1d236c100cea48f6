"""All verbs:  python -m phased_ift_jax [VERB ...]"""

from phased_ift_jax import cli

if __name__ == "__main__":
    cli.main()
