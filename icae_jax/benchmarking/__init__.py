"""What a step costs on the devices at hand: timed, counted, and taken apart by its named parts."""
