"""How a job gets on: what is reported of it, how fast it is, how a guest is slowed down for it, how long we stay."""
