"use strict";
// Takes in newer parts of the page as the server sends them, and leaves alone what is the same.
(() => {
  const live = document.getElementById("live");
  if (!live || !window.EventSource) return;
  let last = [...live.children].map((part) => part.innerHTML);

  // what a person has opened, sorted or reached with the keyboard stays so
  const state = (part) => ({
    open: [...part.querySelectorAll("details")].map((one) => one.open),
    sorted: [...part.querySelectorAll("th")].map((one) => one.getAttribute("aria-sort")),
    filters: [...part.querySelectorAll(".filter")].map((one) => one.value),
    focus: [...part.querySelectorAll("*")].indexOf(document.activeElement),
  });
  const restore = (part, was) => {
    part.querySelectorAll("details").forEach((one, i) => { if (was.open[i]) one.open = true; });
    part.querySelectorAll("th").forEach((one, i) => {
      const wanted = was.sorted[i];
      for (let n = 0; n < 2 && wanted && wanted !== "none" && one.getAttribute("aria-sort") !== wanted; n += 1) {
        one.querySelector("button").click();
      }
    });
    part.querySelectorAll(".filter").forEach((one, i) => {
      if (!was.filters[i]) return;
      one.value = was.filters[i];
      one.dispatchEvent(new Event("input", { bubbles: true }));
    });
    const reached = was.focus >= 0 ? part.querySelectorAll("*")[was.focus] : null;
    if (reached && reached.focus) reached.focus({ preventScroll: true });
  };

  const take = (parts) => {
    parts.forEach((html, index) => {
      if (html === last[index]) return;
      let part = live.children[index];
      if (!part) part = live.appendChild(document.createElement("div"));
      const was = state(part);
      part.innerHTML = html; // made by the server, in which names can only be text
      restore(part, was);
    });
    while (live.children.length > parts.length) live.lastElementChild.remove();
    last = parts;
  };

  const stream = new EventSource(live.dataset.stream);
  stream.addEventListener("parts", (event) => take(JSON.parse(event.data)));
  stream.addEventListener("end", () => stream.close());
})();
