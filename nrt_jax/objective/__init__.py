"""The NRT objective as pure array functions: reward, advantages and loss terms."""
