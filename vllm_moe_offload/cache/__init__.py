"""Who lies where: the planner, the pool of slots, and how many there are."""
