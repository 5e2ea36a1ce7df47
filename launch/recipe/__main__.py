from launch.recipe.cook import main
from magnet_jax.errors import reported, stop_when_terminated

if __name__ == "__main__":
    stop_when_terminated()
    with reported():
        main()
