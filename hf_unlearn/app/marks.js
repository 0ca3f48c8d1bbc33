// A click shows its mark at once; the server, which may be drawing, is told.
element.addEventListener("click", (event) => {
  const tile = event.target.closest("button.tile");
  const chosen = document.querySelector("#kind input:checked");
  if (!tile || !chosen) return;
  const kind = chosen.value;
  tile.classList.remove(kind === "undesired" ? "clean" : "undesired");
  const marked = tile.classList.toggle(kind);
  tile.setAttribute("aria-label", `sample ${tile.dataset.number}${marked ? `, ${kind}` : ""}`);
  trigger("click", { number: Number(tile.dataset.number), kind });
});
