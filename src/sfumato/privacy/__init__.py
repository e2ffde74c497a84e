"""The ground floor: what a promise is, what it costs, who draws the noise, what is left."""
