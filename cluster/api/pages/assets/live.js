"use strict";
// Asks for this page again every few seconds and puts in the parts that have changed. Without this
// file the browser loads the whole page again instead, see <noscript> in base.html.j2.

const shown = new Map(); // as the server sent it: what the reader folded open is no change

function parts(page) {
  return [...page.querySelectorAll("[data-live]")];
}

function replace(part, fresh) {
  const focused = part.contains(document.activeElement) ? document.activeElement : null;
  const target = focused && (focused.id || focused.getAttribute("href"));
  const scrolled = [...part.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  part.replaceChildren(...fresh.childNodes);
  [...part.querySelectorAll(".scroll")].forEach((box, i) => (box.scrollLeft = scrolled[i] || 0));
  if (focused) {
    const again = [...part.querySelectorAll("a, [tabindex]")].find(
      (one) => target && (one.id === target || one.getAttribute("href") === target),
    );
    (again || document.getElementById("main")).focus({ preventScroll: true });
  }
}

async function update() {
  const answer = await fetch(location.href, { cache: "no-store" });
  if (answer.status === 401) {
    location.reload(); // the session has ended: the form to log in
    return true;
  }
  if (!answer.ok) {
    throw new Error(`HTTP ${answer.status}`);
  }
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const byId = new Map(parts(fresh).map((part) => [part.id, part]));
  for (const part of parts(document)) {
    const next = byId.get(part.id);
    if (next && next.innerHTML !== shown.get(part.id)) {
      shown.set(part.id, next.innerHTML);
      replace(part, next);
    }
  }
  document.title = fresh.title;
  return !fresh.documentElement.dataset.refresh; // it changes no more
}

async function follow() {
  const seconds = Number(document.documentElement.dataset.refresh);
  const stale = document.getElementById("stale");
  for (const part of parts(document)) {
    shown.set(part.id, part.innerHTML);
  }
  for (let ended = false; !ended; ) {
    await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    if (document.hidden) {
      continue;
    }
    try {
      ended = await update();
      stale.textContent = "";
    } catch (error) {
      const told = "No answer since then; trying again.";
      if (stale.textContent !== told) {
        stale.textContent = told;
      }
    }
  }
}

follow();
