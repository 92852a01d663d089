"""What the layers whose transition is diagonal and constant in time share."""

import abc

from jaxtyping import Array, Float, Inexact

from pararnn.scan import Diagonal, linear_scan

from .._layer import AbstractLayer


class AbstractConstantDiagonal(AbstractLayer):
    r"""A layer with a diagonal transition that is constant in time.

    $$h_t = \bar{A} \odot h_{t-1} + \mathrm{drive}(x_t), \qquad
    y_t = \mathrm{readout}(h_t, x_t)$$
    """

    @abc.abstractmethod
    def transition(self) -> Inexact[Array, " *state"]:
        r"""$\bar{A}$, one factor for each entry of the state."""

    @abc.abstractmethod
    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Inexact[Array, "*time_and_state"]:
        """What inputs add to the state; leading axes are free."""

    @abc.abstractmethod
    def readout(
        self,
        states: Inexact[Array, "*time_and_state"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        """Outputs of states and inputs; leading axes are free."""

    def mix(self, xs, state, reset):
        xs = xs.astype(self.precision())
        transition = Diagonal(self.transition()[None])
        states = linear_scan(transition, self.drive(xs), state, reset=reset)
        return self.readout(states, xs), states[-1]
